"""A copy of the package and its tests, in which a line can be changed, and processes that run in it."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tools import ROOT

COPIED = ("moe_fn", "property_tests", "compile_tests", "shared_tests", "pyproject.toml")
LINKED = ("docs", "examples", "README.md", "CHANGELOG.md", "SECURITY.md", "Makefile", ".ci")


def copied_tree(folder: Path) -> Path:
    """Copies the package and its tests into a folder. Returns the folder."""
    for name in COPIED:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    return folder


def place_of(old: str, text: str, where: str) -> int:
    """Returns the index of the only occurrence of `old`, where a bug is to be planted."""
    assert text.count(old) == 1, f"{where} has {text.count(old)} places that read {old!r}"
    return text.index(old)


def verdict_of(tree: Path, tests: tuple[str, ...], limit_s: float) -> tuple[str, str]:
    """Runs pytest on these tests in a tree. Returns ("survived" or "killed", by which test)."""
    options = ("-x", "-q", "--tb=no", "-p", "no:xdist", "-W", "ignore", "--hypothesis-profile=unshrunk")
    code, said = run_in(tree, ["-m", "pytest", *options, *tests], limit_s)
    if code == 0:
        return "survived", ""
    failed = [line.split()[1] for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "killed", failed[0] if failed else f"no end in {limit_s:.0f} s" if code is None else f"exit {code}"


def run_in(tree: Path, arguments: list[str], limit_s: float) -> tuple[int | None, str]:
    """Runs Python in a tree. Returns (exit code, None after the limit; output).

    Kernels are built into a cache inside the tree.
    """
    env = {
        **os.environ,  # noqa: TID251
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCH_EXTENSIONS_DIR": str(tree / "cache"),
    }
    command = [sys.executable, *arguments]
    run = subprocess.Popen(
        command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        said, _ = run.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        return None, ""
    return run.returncode, said
