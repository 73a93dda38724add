"""File of the compiled library: only an intact one is loaded, the first of several processes builds it, in the folder
for torch's extensions.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

import moe_fn
from moe_fn.kernels.native import building
from moe_fn.kernels.native import library as native
from moe_fn.kernels.native.building import library_file
from moe_fn.kernels.native.trust import private_folder

POSIX = pytest.mark.skipif(os.name != "posix", reason="processes are forked")
AS_ROOT = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can change the user")
OTHER = 65534
NAME = "moe_fn_plain_0123456789abcdef"
HELD = b"what a compiler writes" * 1000


def build(to: Path) -> None:
    to.write_bytes(HELD)


def never(to: Path) -> None:
    raise AssertionError("built once more")


def child(act: Callable[[], Any], user: int | None = None) -> tuple[int, Any]:
    """Forks a process, optionally of another user. Returns its id, and a pipe with the result or error of `act`."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            text = str(act())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    return process, os.fdopen(reading)


def answer(process: int, pipe: Any) -> str:
    with pipe:
        text: str = pipe.read()
    os.waitpid(process, 0)
    return text


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that every user may enter, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_library_is_built_once_and_found(tmp_path: Path) -> None:
    path = library_file(tmp_path, NAME, build)
    assert path.read_bytes() == HELD and path.stat().st_mode & 0o777 == 0o755
    assert library_file(tmp_path, NAME, never) == path
    other = library_file(tmp_path, f"{NAME}_longer", build)  # a name that starts with another one
    assert library_file(tmp_path, NAME, never) == path and other != path
    assert not list(tmp_path.glob("build-*"))


@pytest.mark.parametrize("damage", ["empty", "cut", "longer", "changed", "for all to write"])
def test_a_damaged_library_is_built_anew(tmp_path: Path, damage: str) -> None:
    path = library_file(tmp_path, NAME, build)
    changed = bytes([HELD[0] ^ 1]) + HELD[1:]
    path.write_bytes({"empty": b"", "cut": HELD[:-1], "longer": HELD + b"\0", "changed": changed}.get(damage, HELD))
    path.chmod(0o757 if damage == "for all to write" else 0o755)
    built = []
    assert library_file(tmp_path, NAME, lambda to: built.append(build(to))) == path and built == [None]
    assert path.read_bytes() == HELD and path.stat().st_mode & 0o777 == 0o755


def test_another_file_of_the_name_is_no_library(tmp_path: Path) -> None:
    old, link = tmp_path / f"{NAME}_{'0' * 16}.so", tmp_path / f"{NAME}_{'1' * 16}.so"
    old.write_bytes(HELD[:7])
    link.symlink_to(old)
    path = library_file(tmp_path, NAME, build)
    assert sorted(tmp_path.glob("*.so")) == [path]


@POSIX
def test_of_processes_that_come_together_one_builds(tmp_path: Path) -> None:
    def slowly(to: Path) -> None:
        (tmp_path / f"built by {os.getpid()}").touch()
        time.sleep(0.5)
        build(to)

    children = [child(lambda: library_file(tmp_path, NAME, slowly)) for _ in range(4)]
    paths = {answer(*one) for one in children}
    assert paths == {str(library_file(tmp_path, NAME, never))}
    assert len(list(tmp_path.glob("built by *"))) == 1


@POSIX
def test_a_killed_build_holds_nobody_up_and_leaves_nothing(tmp_path: Path) -> None:
    process, pipe = child(lambda: library_file(tmp_path, NAME, lambda to: (build(to), time.sleep(60))))  # type: ignore[arg-type, return-value]
    while not list(tmp_path.glob("build-*/*.so")):
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    assert answer(process, pipe) == ""
    assert len(list(tmp_path.glob("build-*"))) == 1
    path = library_file(tmp_path, NAME, build)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "lock", path]


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        library_file(tmp_path, NAME, never)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@POSIX
@pytest.mark.parametrize("why", ["no locks", "held for ever"])
def test_without_a_lock_it_builds_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    import fcntl

    new, old = tmp_path / "build-new", tmp_path / "build-old"
    for left in (new, old):
        left.mkdir()
    os.utime(old, (0, 0))
    with (tmp_path / "lock").open("w") as held:
        if why == "no locks":
            monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
        else:
            fcntl.flock(held, fcntl.LOCK_EX)
            monkeypatch.setattr(building, "PATIENCE", 0.2)
        path = library_file(tmp_path, NAME, build)
    assert path.exists() and new.exists() and not old.exists()  # the new one may be a build in progress


@AS_ROOT
def test_what_root_has_built_is_for_every_user(open_path: Path) -> None:
    old = os.umask(0o077)
    try:
        folder = private_folder(open_path / "moe_fn")
        path = library_file(folder, NAME, build)
    finally:
        os.umask(old)
    subprocess.run(["chmod", "-R", "a+rX,a-w", str(folder)], check=True)  # as SECURITY.md says
    assert (
        answer(*child(lambda: library_file(private_folder(folder), NAME, never).read_bytes() == HELD, OTHER)) == "True"
    )
    for closed, mode in ((path, 0o500), (folder, 0o700)):
        closed.chmod(mode)
        text = answer(*child(lambda: library_file(folder, NAME, build), OTHER))
        assert f"PermissionError: user {OTHER} may not read {closed}; expected a library that all users" in text


@AS_ROOT
def test_a_folder_that_cannot_be_written_says_what_is_missing(open_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = private_folder(open_path / "moe_fn")
    words = (
        f"PermissionError: {folder} has no intact {NAME}, and user {OTHER} may not write there (Permission denied); "
        "expected a library that was built there"
    )
    assert words in answer(*child(lambda: library_file(folder, NAME, build), OTHER))
    path = library_file(folder, NAME, build)
    path.write_bytes(b"")
    assert words in answer(*child(lambda: library_file(folder, NAME, build), OTHER))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(open_path / "closed" / "folder"))
    (open_path / "closed").mkdir(mode=0o700)
    text = answer(*child(native._folder, OTHER))
    assert f"user {OTHER} may not create or enter {open_path}/closed/folder (Permission denied); expected" in text
    folder.chmod(0o775)
    text = answer(*child(lambda: private_folder(folder), OTHER))
    assert f"{folder} has mode 775, and user {OTHER} cannot change it" in text


def folder_with(monkeypatch: pytest.MonkeyPatch, **environment: str | None) -> Path:
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "HOME"):
        value = environment.get(name)
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    return native._folder()


def test_the_folder_is_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in (
        {"TORCH_EXTENSIONS_DIR": f"{tmp_path}/a"},
        {"XDG_CACHE_HOME": f"{tmp_path}/b", "TORCH_EXTENSIONS_DIR": None},
    ):
        found = folder_with(monkeypatch, HOME=str(tmp_path), **settings)
        assert found == Path(cpp_extension._get_build_directory("moe_fn", False)) and found.is_relative_to(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="XDG's folders")
@pytest.mark.parametrize("relative", ["", "cache"])
def test_the_working_folder_is_never_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: str) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    home, asked = tmp_path / "home", tmp_path / "asked"
    found = folder_with(monkeypatch, HOME=str(home), XDG_CACHE_HOME=relative)
    assert found.is_relative_to(home / ".cache" / "torch_extensions") and found.name == "moe_fn"
    assert (
        folder_with(monkeypatch, HOME=str(home), XDG_CACHE_HOME=relative, TORCH_EXTENSIONS_DIR=str(asked))
        == asked / "moe_fn"
    )
    with pytest.raises(ValueError, match=r"directory for extensions is '.*moe_fn'; expected an absolute path"):
        folder_with(monkeypatch, HOME=str(home), TORCH_EXTENSIONS_DIR=relative)
    with pytest.raises(ValueError, match=r"expected an absolute path"):
        folder_with(monkeypatch, HOME="home", XDG_CACHE_HOME=relative)
    left = [path for path in (tmp_path / "work").rglob("*") if "moe_fn" in path.name or "torch_extensions" in path.name]
    assert not left


def test_a_library_for_another_machine_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import platform

    names = {native._fingerprint("plain"), native._fingerprint("avx2")}
    changes: list[tuple[Any, str, Any]] = [
        (platform, "machine", lambda: "another"),
        (platform, "libc_ver", lambda: ("glibc", "2.1")),
        (sys, "platform", "another"),
        (torch, "__version__", "0"),
        (native, "FLAGS", ("-O0",)),
    ]
    for owner, name, value in changes:
        with monkeypatch.context() as changed:
            changed.setattr(owner, name, value)
            names.add(native._fingerprint("plain"))
    assert len(names) == 2 + len(changes)


IN_A_ZIP = """
import torch, moe_fn
assert ".zip" in moe_fn.__file__
config = moe_fn.MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=8)
weights = moe_fn.MoEWeights(gate_up=torch.randn(4, 16, 8), down=torch.randn(4, 8, 8))
x, logits = torch.randn(5, 8), torch.randn(5, 4)
y = moe_fn.moe_forward(config, moe_fn.prepare_weights(config, weights), x, logits)
torch.testing.assert_close(y.double(), moe_fn.reference.moe_forward(config, weights, x, logits), rtol=1e-5, atol=1e-5)
(native,) = [info for info in moe_fn.backends() if info.name == "native"]
assert not native.available and "no C++ sources at" in native.reason, native.reason
"""


def test_from_a_zip_without_sources_torch_runs_and_says_why(tmp_path: Path) -> None:
    package = Path(moe_fn.__file__).parent
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        for file in package.rglob("*.py"):
            archive.write(file, file.relative_to(package.parent))
    command = ["env", f"PYTHONPATH={tmp_path / 'app.zip'}", sys.executable, "-c", IN_A_ZIP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no native CPU kernels (FileNotFoundError: no C++ sources" in done.stderr
