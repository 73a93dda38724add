"""Finds the compiled library of the C++ kernels as a file, or builds it in one process while others wait.

A file's name ends in a digest of its contents: a truncated or overwritten file (full disk, interrupted copy, crash) is
never loaded, because loading half a library crashes the process. It is built in a temporary directory and moved into
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

from moe_fn.kernels.native.trust import is_trusted, user

PATIENCE = 600.0  # seconds to wait for another process that builds; then it is assumed to hang
STALE = 3600.0  # seconds after which a build directory is abandoned, on file systems without locks

_log = logging.getLogger("moe_fn")


def library_file(folder: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The file of the library `name` in a directory; `build` writes it to the path that it is given if it is missing.

    Raises PermissionError if the directory cannot be read, or if the library is missing and cannot be written.
    """
    whole, _ = _libraries(folder, name)
    if whole:
        return whole[0]
    with _alone(folder, name) as alone:
        whole, damaged = _libraries(folder, name)
        if whole:  # built by another process while this one waited
            return whole[0]
        for file in damaged:
            _log.warning("moe_fn: %s is damaged, or another user could have written it; it is rebuilt", file)
            with contextlib.suppress(OSError):
                file.unlink()
        _remove_stale(folder, alone)
        return _built(folder, name, build)


def _libraries(folder: Path, name: str) -> tuple[list[Path], list[Path]]:
    """Files of the library: (intact, damaged or not trusted)."""
    whole: list[Path] = []
    damaged: list[Path] = []
    try:
        for file in sorted(folder / entry for entry in os.listdir(folder)):
            if file.suffix == ".so" and file.stem.rpartition("_")[0] == name:
                (whole if is_trusted(file) and file.stem == f"{name}_{_digest(file)}" else damaged).append(file)
    except PermissionError as error:
        raise PermissionError(
            f"{user()} may not read {error.filename}; expected a library that all users can read (chmod -R a+rX), "
            "or a directory of this user in TORCH_EXTENSIONS_DIR"
        ) from error
    return whole, damaged


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as data:
            return hashlib.file_digest(data, "sha256").hexdigest()[:16]
    except FileNotFoundError:
        return "removed"


@contextlib.contextmanager
def _alone(folder: Path, name: str) -> Iterator[bool]:
    """Holds the directory's lock, and yields whether it was acquired.

    The system releases the lock of a process that is killed.
    """
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise PermissionError(
            f"{folder} has no intact {name}, and {user()} may not write there ({error.strerror}); "
            "expected a library that was built there before, or a directory of this user in TORCH_EXTENSIONS_DIR"
        ) from error
    try:
        yield _locked(lock, folder)
    finally:
        os.close(lock)


def _locked(lock: int, folder: Path) -> bool:
    """Whether the lock was acquired: False on a file system without locks, and if another process holds it for longer
    than PATIENCE.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    deadline, logged = time.monotonic() + PATIENCE, False
    while time.monotonic() < deadline:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not logged:
                _log.warning("moe_fn: another process builds the CPU kernels in %s; waiting for it", folder)
            logged = True
            time.sleep(0.1)
        except OSError:
            return False
    return False


def _remove_stale(folder: Path, alone: bool) -> None:
    """Removes build directories of killed processes: all of them with the lock, old ones without it."""
    for left in folder.glob("build-*"):
        with contextlib.suppress(OSError):
            if alone or time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left)


def _built(folder: Path, name: str, build: Callable[[Path], None]) -> Path:
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder, ignore_cleanup_errors=True) as own:
        built = Path(own) / f"{name}.so"
        build(built)
        built.chmod(0o755)  # for any umask: other users can read it, and a file that they can write is not loaded
        path = folder / f"{name}_{_digest(built)}.so"
        os.replace(built, path)
    return path
