"""The compiled library as a file: found whole, or built by one process while the others wait.

A file's name ends in a digest of what it holds: one that was cut off or overwritten (a full disk, a copy that stopped,
a crash) is never loaded, for to load half a library ends the process. It is built in a folder of its own and moved into
place.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_fn.kernels.native.trust import only_ours, user

PATIENCE = 600.0  # seconds to wait for another process that builds; then it is taken to hang
STALE = 3600.0  # seconds after which a build folder is nobody's, where no lock says so

_log = logging.getLogger("moe_fn")


def library_file(folder: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The file of the library `name` in a folder: there already, or what `build` writes to the path that it is given.

    Raises PermissionError in words if the folder cannot be read, or if there is no library and none can be written.
    """
    whole, _ = _libraries(folder, name)
    if whole:
        return whole[0]
    with _alone(folder, name) as alone:
        whole, damaged = _libraries(folder, name)
        if whole:  # by the process that this one has waited for
            return whole[0]
        for file in damaged:
            _log.warning("moe_fn: %s is damaged, or may have been written by others; it is built anew", file)
            with contextlib.suppress(OSError):
                file.unlink()
        _remove_stale(folder, alone)
        return _built(folder, name, build)


def _libraries(folder: Path, name: str) -> tuple[list[Path], list[Path]]:
    """(whole, damaged) files of the library."""
    whole: list[Path] = []
    damaged: list[Path] = []
    try:
        for file in sorted(folder / entry for entry in os.listdir(folder)):
            if file.suffix == ".so" and file.stem.rpartition("_")[0] == name:
                (whole if only_ours(file) and file.stem == f"{name}_{_digest(file)}" else damaged).append(file)
    except PermissionError as error:
        raise PermissionError(
            f"{user()} may not read {error.filename}; expected the library readable for all (chmod -R a+rX), "
            "or a folder of this user's own in TORCH_EXTENSIONS_DIR"
        ) from error
    return whole, damaged


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as data:
            return hashlib.file_digest(data, "sha256").hexdigest()[:16]
    except FileNotFoundError:
        return "removed meanwhile"


@contextlib.contextmanager
def _alone(folder: Path, name: str) -> Iterator[bool]:
    """Hold the folder's lock; False where there is none to be had.

    The system releases the lock of a process that is killed.
    """
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise PermissionError(
            f"no whole {name} in {folder}, where {user()} may not write ({error.strerror}); "
            "expected it built there before, "
            "or a folder of this user's own in TORCH_EXTENSIONS_DIR"
        ) from error
    try:
        yield _locked(lock, folder)
    finally:
        os.close(lock)


def _locked(lock: int, folder: Path) -> bool:
    """Whether the lock was got; not on a file system without locks, nor while another process holds it for longer than
    a build takes.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    deadline, told = time.monotonic() + PATIENCE, False
    while time.monotonic() < deadline:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not told:
                _log.warning("moe_fn: another process builds the CPU kernels in %s; waiting for it", folder)
            told = True
            time.sleep(0.1)
        except OSError:
            return False
    return False


def _remove_stale(folder: Path, alone: bool) -> None:
    """Remove what killed builds have left: with the lock, all build folders; without it, old ones."""
    for left in folder.glob("build-*"):
        with contextlib.suppress(OSError):
            if alone or time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left)


def _built(folder: Path, name: str, build: Callable[[Path], None]) -> Path:
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder, ignore_cleanup_errors=True) as own:
        built = Path(own) / f"{name}.so"
        build(built)
        built.chmod(0o755)  # whatever the umask: others may read it, and what they may write is not loaded
        path = folder / f"{name}_{_digest(built)}.so"
        os.replace(built, path)
    return path
