"""Side effects of an import and of a call, folders from which libraries are loaded, and contents of the
wheel, which has the sources to build them.
"""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import moe_fn
from moe_fn.kernels.native.trust import is_trusted, private_folder

PACKAGE = Path(moe_fn.__file__).parent
AS_ROOT = os.name == "posix" and os.geteuid() == 0

# Other packages are imported first, so that their side effects do not count. Then nothing may be written, loaded,
# started or reached.
QUIET = """
import logging, os, random, signal, sys, threading, warnings
sys.dont_write_bytecode = True  # what Python itself would write
import torch, torch._dynamo.testing, torch.distributed.tensor, torch.utils._pytree
for name in ("numpy", "hypothesis.strategies", "safetensors.torch", "transformers", "triton.language"):
    try:
        __import__(name)
    except ImportError:
        pass

touched = []
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
ALONE = ("subprocess.", "socket.", "shutil.", "tempfile.", "ctypes.", "urllib.", "pty.", "sqlite3.", "signal.")
CHANGES = {f"os.{name}" for name in (
    "system exec posix_spawn fork forkpty spawn kill mkdir rmdir remove rename link symlink truncate chmod chown utime putenv chdir"
).split()}

def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & WRITING):
            touched.append((event, path))
    elif event.startswith(ALONE) or event in CHANGES:
        touched.append((event, *map(str, arguments)))

def state():
    flags = (torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
    flags += (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), torch.cuda.is_initialized())
    process = (dict(os.environ), os.getcwd(), list(sys.path), threading.active_count(), sys.excepthook, sys.getrecursionlimit())
    process += (list(warnings.filters), list(logging.getLogger().handlers), logging.getLogger("moe_fn").handlers)
    return flags, process, torch.get_rng_state().tolist(), random.getstate(), signal.getsignal(signal.SIGINT)

before = state()
torch._C._cuda_init = None  # would be an error now, not a device
sys.addaudithook(watch)
"""  # noqa: E501
IMPORTS = """
import moe_fn
import moe_fn.balance, moe_fn.families, moe_fn.parallel, moe_fn.quant, moe_fn.reference, moe_fn.testing, moe_fn.kernels.native.library
import moe_fn.integrations.vllm, moe_fn.integrations.torchtitan, moe_fn.bench
for package, name in (("safetensors", "checkpoint"), ("transformers", "integrations.transformers")):
    if package in sys.modules:
        __import__(f"moe_fn.{name}")
"""  # noqa: E501
CALL = """
config = moe_fn.MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=8, backend="torch")
generator = torch.Generator().manual_seed(0)
new = lambda *shape: torch.randn(shape, generator=generator, requires_grad=True)
weights = moe_fn.MoEWeights(gate_up=new(4, 16, 8), down=new(4, 8, 8))
moe_fn.moe_forward(config, weights, new(5, 8), new(5, 4)).sum().backward()
"""
SAME = """
assert not touched, touched
after = state()
assert after == before, [(a, b) for a, b in zip(before, after) if a != b]
"""
REFUSED = """
native = next(info for info in moe_fn.backends() if info.name == "native")
assert os.name != "posix" or "PermissionError" in native.reason and "is world-writable" in native.reason, native.reason
"""


def test_import_and_torch_backend_write_load_start_and_reach_nothing(tmp_path: Path) -> None:
    """No files, processes, sockets, libraries, devices, threads, seeds and flags are changed.

    The same process, as each costs seconds, checks that a cache folder that all users may write to is refused.
    """
    program = "\n".join((QUIET, IMPORTS, SAME, CALL, SAME, REFUSED))
    tmp_path.chmod(0o777)
    command = ["env", "-u", "TORCH_EXTENSIONS_DIR", f"XDG_CACHE_HOME={tmp_path}", sys.executable, "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=PACKAGE.parent)
    assert ran.returncode == 0, ran.stderr
    assert not list(tmp_path.rglob("*.so")), "a kernel was built"


def test_the_watch_sees_what_it_is_there_for(tmp_path: Path) -> None:
    deeds = (
        "open('f', 'w')",
        "__import__('subprocess').run(['true'])",
        "__import__('socket').socket()",
        "os.environ.update(A='b')",
    )
    watching = QUIET.partition("touched = []")[2].partition("before = state()")[0]
    tried = "".join(f"\nbefore = len(touched)\n{deed}\nassert len(touched) > before, {deed!r}" for deed in deeds)
    program = "import os, sys\ntouched = []" + watching.partition("def state")[0] + "sys.addaudithook(watch)" + tried
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_every_file_of_the_package_is_in_the_wheel() -> None:
    pyproject = PACKAGE.parent / "pyproject.toml"
    if not pyproject.exists():
        pytest.skip("installed without the repository")
    patterns = tomllib.loads(pyproject.read_text())["tool"]["setuptools"]["package-data"]["moe_fn"]
    packed = {file for pattern in patterns for file in PACKAGE.glob(pattern)}
    data = {file for file in PACKAGE.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert data == packed
    assert all((file.parent / "__init__.py").exists() for file in PACKAGE.rglob("*.py")), (
        "a folder without __init__.py is left out"
    )


def test_a_new_folder_is_ours_to_write_and_an_open_one_is_closed(tmp_path: Path) -> None:
    tmp_path.joinpath("a").mkdir(mode=0o755)
    old = os.umask(0)
    try:
        assert private_folder(tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(old)
    tmp_path.joinpath("a", "b").chmod(0o775)
    assert private_folder(tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o755
    tmp_path.joinpath("a").chmod(0o777)
    with pytest.raises(
        PermissionError,
        match=r"a is world-writable; expected a directory of one user",
    ):
        private_folder(tmp_path / "a" / "b")
    tmp_path.joinpath("a").chmod(0o1777)  # as /tmp: only the owner removes a file
    private_folder(tmp_path / "a" / "b")


def test_libraries_that_others_may_have_written_are_not_loaded(tmp_path: Path) -> None:
    file, link = tmp_path / "library.so", tmp_path / "link.so"
    assert not is_trusted(file)
    file.write_bytes(b"")
    file.chmod(0o755)
    link.symlink_to(file)
    assert is_trusted(file) and not is_trusted(link)
    for mode in (0o775, 0o757):
        file.chmod(mode)
        assert not is_trusted(file)


@pytest.mark.skipif(not AS_ROOT, reason="only root can change the owner of files")
def test_folders_and_libraries_of_other_users_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "library.so"
    file.write_bytes(b"")
    os.chown(file, 12345, -1)
    assert not is_trusted(file)
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(PermissionError, match=r"belongs to user 12345; expected this user's or root's"):
        private_folder(tmp_path / "moe_fn")
