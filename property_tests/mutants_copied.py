"""A sample of mutants, each in a copy of the tree, where ranks, compiled kernels and plug-ins see it too; the tests in a process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutants_areas import AREAS, Area
from mutants_made import ROOT, Mutant, source_hash

COPIED = ("moe_fn", "property_tests", "compile_tests", "pyproject.toml")
LINKED = ("docs", "examples", "README.md", "CHANGELOG.md", "SECURITY.md", "Makefile", ".ci")


def sample(found: Path, names: list[str], per_file: int) -> None:
    """Test `per_file` mutants of every file of the areas, a line of JSON each; what `found` holds is not run again."""
    found.parent.mkdir(parents=True, exist_ok=True)
    done = {json.loads(line)["id"] for line in found.read_text().splitlines()} if found.exists() else set()
    with tempfile.TemporaryDirectory() as folder:
        tree = _copied_tree(Path(folder))
        _run(tree, ["-c", "import moe_fn.kernels.native as n; n.active()"], 3600.0)  # tests of ranks have less time than a compiler wants
        for name in names or list(AREAS):
            area = AREAS[name]
            todo = [m for file in area.paths for m in area.made(file, per_file) if m.id not in done]
            if not todo:
                continue
            print(f"{name}: {len(todo)} mutants", flush=True)
            verdict, by, seconds = _judged(tree, area, 3600.0)
            if verdict != "survived":
                raise RuntimeError(f"{name}: the code as it is fails {by}")
            for mutant in todo:
                verdict, by, took = _planted(tree, mutant, area, 2 * seconds + 120)
                line = {
                    **mutant.described,
                    "area": name,
                    "of": source_hash(mutant.file),
                    "verdict": verdict,
                    "by": by,
                    "seconds": round(took),
                }
                with found.open("a") as out:
                    out.write(json.dumps(line) + "\n")
                print(f"{mutant.file}:{mutant.line} {verdict} {by or mutant.change} {took:.0f} s", flush=True)


def _copied_tree(folder: Path) -> Path:
    for name in COPIED:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    return folder


def _planted(tree: Path, mutant: Mutant, area: Area, limit_s: float) -> tuple[str, str, float]:
    path = tree / mutant.file
    before = path.read_text()
    path.write_text(mutant.source)
    try:
        return _judged(tree, area, limit_s)
    finally:
        path.write_text(before)


def _judged(tree: Path, area: Area, limit_s: float) -> tuple[str, str, float]:
    """("survived" or "killed", by which test, seconds)."""
    start = time.monotonic()
    code, said = _run(tree, ["-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:xdist", "-W", "ignore", *area.tests], limit_s)
    if code == 0:
        return "survived", "", time.monotonic() - start
    failed = [line.split()[1] for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    by = failed[0] if failed else f"no end in {limit_s:.0f} s" if code is None else f"exit {code}"
    return "killed", by, time.monotonic() - start


def _run(tree: Path, arguments: list[str], limit_s: float) -> tuple[int | None, str]:
    """(exit code, None after the limit; what it printed). Kernels of mutants go into a cache of their own."""
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "XDG_CACHE_HOME": str(tree / "cache")}  # noqa: TID251
    command = [sys.executable, *arguments]
    run = subprocess.Popen(command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    try:
        said, _ = run.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        return None, ""
    return run.returncode, said
