"""Mutation testing: does a test fail for every small change of the code?  `make mutants`, or

    python -m tools.mutants run out/mutants.jsonl moe_fn/stages/*.py      skips mutants that the file already has
    python -m tools.mutants sample out/mutants-areas.jsonl [AREA ...]     some of every file of the areas around the
                                                                          stages
    python -m tools.mutants quick out/mutants-areas.jsonl AREA ...        faster, in forks; run sample afterwards for
                                                                          what survives
    python -m tools.mutants report out/mutants.jsonl out/mutants-areas.jsonl > examples/campaign/mutants.md

with PYTHONPATH=.:property_tests.

For stages all mutants of mutmut are tested. Its own runner keeps all mutants of a function in one module and chooses
between them at each call, which does not work with lambdas in tables, torch's compiler and tests that read sources. So
each mutant runs in its own process. If the change is inside a function, the process is forked from one that has
imported everything, and the function's code is replaced; otherwise from one that has imported no module of moe_fn, and
it imports the changed module. Mutants of other areas (`areas.py`) are sampled, in copies of the tree (`copied.py`).
"""

import argparse
import gc
import importlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import conftest  # noqa: F401
from hypothesis import settings

from tools import ROOT
from tools.mutants.areas import AREAS
from tools.mutants.copied import sample
from tools.mutants.forked import sample_in_forks
from tools.mutants.judged import Plan, judged
from tools.mutants.judges import direct_of, tests_of
from tools.mutants.made import Mutant, mutants_of
from tools.mutants.report import report, report_of_areas
from tools.mutants.same import reason_of


def import_what_others_made() -> None:
    """Imports all that the tests import except moe_fn and the tests, so that a child imports little."""
    code = "import sys, conftest, moe_fn.testing, test_layer, test_lora, test_quant; print(*sys.modules)"
    path = f"{ROOT}:{ROOT / 'property_tests'}"
    names = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},  # noqa: TID251
        stdout=subprocess.PIPE,
        check=True,
    )
    for name in names.stdout.decode().split():
        first = name.split(".")[0]
        ours = first in ("moe_fn", "shared_tests", "__main__") or any(
            (ROOT / "property_tests" / own).exists() for own in (first, f"{first}.py")
        )
        if not ours and name not in sys.modules:
            try:
                importlib.import_module(name)
            except ImportError:  # a module that exists in sys.modules only
                continue
    assert not any(name.split(".")[0] == "moe_fn" for name in sys.modules)
    gc.freeze()


def import_ours(plan: Plan) -> None:
    """Imports moe_fn and the tests, and runs one of them, so that caches are filled."""
    settings.load_profile(plan.profile)  # a test takes the profile when it is defined
    for name in plan.direct:
        importlib.import_module(name.partition(".")[0])
    importlib.import_module("test_layer").test_the_layer_equals_the_reference()
    gc.collect()
    gc.freeze()


def run(found: Path, files: Sequence[str], own: bool) -> None:
    """Tests every mutant of the files that `found` does not contain, and appends a line of JSON for each.

    own: tests those that survived with the files' own tests instead, except those that are equivalent programs.
    """
    found.parent.mkdir(parents=True, exist_ok=True)
    old = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
    last = {line["id"]: line["verdict"] for line in old}
    import_what_others_made()
    for file in files:
        todo = [m for m in mutants_of(file) if last.get(m.id) == ("survived" if own else None)]
        todo = [m for m in todo if not (own and reason_of(file, m.change))]
        plan = Plan(direct_of(file), tests_of(file) if own else (), "mutants", Counter())
        for inside in (True, False):
            some = [m for m in todo if m.inside == inside]
            child = os.fork() if some else None
            if child == 0:
                if inside:
                    import_ours(plan)
                _run_some(found, some, plan)
                os._exit(0)
            if child is not None and os.waitpid(child, 0)[1] != 0:
                raise RuntimeError(f"{file}: the tests fail for the code as it is, or the runner broke")


def _run_some(found: Path, mutants: Sequence[Mutant], plan: Plan) -> None:
    verdict, by = judged(None, plan)
    if verdict != "survived":
        print(f"the code as it is fails {by}", flush=True)
        os._exit(1)
    for mutant in mutants:
        start = time.monotonic()
        verdict, by = judged(mutant, plan)
        plan.kills[by] += verdict == "killed"
        line = {
            **mutant.described,
            "verdict": verdict,
            "by": by,
            "own": bool(plan.tests),
            "seconds": round(time.monotonic() - start, 1),
        }
        with found.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(f"{mutant.file}:{mutant.line} {verdict} {by or mutant.change} {line['seconds']}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    all_of = what.add_parser("run", help="all mutants of files")
    all_of.add_argument("found", type=Path, help="lines of JSON, one a mutant")
    all_of.add_argument("files", nargs="*")
    all_of.add_argument("--own", action="store_true", help="run the survivors again, against the file's own tests")
    some_of = what.add_parser("sample", help="some mutants of every file of areas")
    some_of.add_argument("found", type=Path, help="lines of JSON, one a mutant")
    some_of.add_argument("areas", nargs="*", choices=[[], *AREAS], help="default: all")
    some_of.add_argument("--per-file", type=int, default=4)
    quick = what.add_parser("quick", help="the same of those inside of functions, in children of one process")
    quick.add_argument("found", type=Path, help="lines of JSON, one a mutant")
    quick.add_argument("areas", nargs="+", choices=[*AREAS])
    quick.add_argument("--per-file", type=int, default=4)
    page = what.add_parser("report", help="Markdown of both")
    page.add_argument("found", type=Path)
    page.add_argument("sampled", type=Path)
    part = what.add_parser("areas", help="the page's part on the samples")
    part.add_argument("sampled", type=Path)
    a = parser.parse_args()
    if a.what == "run":
        run(a.found, a.files, a.own)
    elif a.what == "sample":
        sample(a.found, a.areas, a.per_file)
    elif a.what == "quick":
        sample_in_forks(a.found, a.areas, a.per_file)
    elif a.what == "areas":
        print(report_of_areas(a.sampled))
    else:
        print(report(a.found, a.sampled))
