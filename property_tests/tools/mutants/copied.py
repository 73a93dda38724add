"""Tests a sample of mutants, each in a copy of the tree, so that ranks, compiled kernels and plug-ins run it too."""

import json
import tempfile
import time
from pathlib import Path

from tools.copied_tree import copied_tree, run_in, verdict_of
from tools.mutants.areas import AREAS, Area
from tools.mutants.made import Mutant, source_hash


def sample(found: Path, names: list[str], per_file: int) -> None:
    """Tests `per_file` mutants of every file of the areas that `found` does not contain; a line of JSON for each."""
    found.parent.mkdir(parents=True, exist_ok=True)
    old = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
    done = {line["id"]: line for line in old}
    # survivors of forks are tested again in copies, which cover more
    done = {name for name, line in done.items() if line["verdict"] == "killed" or not line.get("forked")}
    with tempfile.TemporaryDirectory() as folder:
        tree = copied_tree(Path(folder))
        run_in(
            tree, ["-c", "import moe_fn.kernels.native.library as n; n.active()"], 3600.0
        )  # compile before tests of ranks, whose time limits are shorter than a build
        for name in names or list(AREAS):
            area = AREAS[name]
            todo = [m for file in area.paths for m in area.made(file, per_file) if m.id not in done]
            if not todo:
                continue
            print(f"{name}: {len(todo)} mutants", flush=True)
            start = time.monotonic()
            verdict, by = verdict_of(tree, area.tests, 3600.0)
            limit_s = 2 * (time.monotonic() - start) + 120
            if verdict != "survived":
                raise RuntimeError(f"{name}: the code as it is fails {by}")
            for mutant in todo:
                start = time.monotonic()
                verdict, by = _planted(tree, mutant, area, limit_s)
                took = round(time.monotonic() - start)
                line = {
                    **mutant.described,
                    "area": name,
                    "of": source_hash(mutant.file),
                    "verdict": verdict,
                    "by": by,
                    "seconds": took,
                }
                with found.open("a") as out:
                    out.write(json.dumps(line) + "\n")
                print(f"{mutant.file}:{mutant.line} {verdict} {by or mutant.change} {took} s", flush=True)


def _planted(tree: Path, mutant: Mutant, area: Area, limit_s: float) -> tuple[str, str]:
    path = tree / mutant.file
    before = path.read_text()
    path.write_text(mutant.source)
    try:
        if run_in(tree, ["-m", "mypy"], limit_s)[0] != 0:  # the first part of make test
            return "killed", "mypy"
        return verdict_of(tree, area.tests_of(mutant.file), limit_s)
    finally:
        path.write_text(before)
