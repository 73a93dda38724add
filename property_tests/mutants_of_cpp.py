"""Mutation testing of the C++ kernels: does a test fail for every small change of a line?  `make mutants-cpp`, or

    python property_tests/mutants_of_cpp.py run out/mutants-cpp.jsonl backward.cpp kernels.h      what is in the file is not run again
    python property_tests/mutants_of_cpp.py report out/mutants-cpp.jsonl > out/mutants-cpp.md

A mutant is a file of moe_fn/kernels/cpu with another operator, constant, bound or condition in one place. It is compiled for one level,
loaded by a process of its own, and judged by the tests that are given a level (cpp_mutants.py). `--every 10` takes a tenth of them.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  before Triton: it says how kernels run
from cpp_mutants import UNITS_OF, Change, Workshop, judged
from hypothesis import settings

from moe_fn.kernels import native

SWAPS = {
    " < ": " <= ", " <= ": " < ", " > ": " >= ", " >= ": " > ", " == ": " != ", " != ": " == ", " + ": " - ", " - ": " + ", " * ": " + ",
    " / ": " * ", " % ": " / ", " += ": " = ", " && ": " || ", " || ": " && ", "std::min": "std::max", "std::max": "std::min",
    "true": "false", "false": "true", "first": "last", "gate_up": "down",
}  # fmt: skip
PLACE = re.compile("|".join([*(re.escape(old) for old in sorted(SWAPS, key=len, reverse=True)), r"(?<![\w.])\d+(?![\w.])", r"\bif \("]))
FLOATS = (
    "test_native_backward.test_gradients_of_every_level",
    "test_native.test_every_level_equals_the_reference",
    "test_native_backward.test_outer_products_of_segments",
    "test_native_backward.test_outer_products_of_many_rows",
    "test_native.test_grouped_products_of_every_level",
    "test_native.test_few_and_many_rows_of_weights_kept_in_out",
    "test_native_backward.test_gradients_of_more_rows_than_a_block_or_a_chunk",
)
CODES = (
    "test_quant_native.test_every_level_equals_the_reference",
    "test_quant_native.test_the_bits_of_a_token_do_not_depend_on_the_others",
    "test_quant_native.test_missing_values_stay_in_their_rows",
)
# Why a mutant is the same program but for its speed: texts of the changed line.
SAME: dict[str, tuple[str, ...]] = {
    "Only who computes which part, and when, changes.": (
        *("int rows = std::clamp(256", "panels_at_once = int(", "int64_t parts = ", "groups = ", "int per = std::clamp(panels"),
        *("tasks = ", "per = (panels", "24 *"),
    ),
    "It is asked of memory before it is needed.": ("prefetch", "next = ", "ahead"),
    "A buffer is larger than it must be, or its memory comes in other pages.": (
        "buffer(",
        "std::vector<int64_t> to(",
        "const int most = ",
        "aligned_alloc",
        "MADV",
        "large",
        "huge",
    ),
    "Steps come in whole blocks, and a turn without panels does nothing.": ("k > 1,", "p <= task.last_panel"),
    "The benchmark alone calls it.": ("seconds", "repeats", "share", "total{0}"),
}


def mutants_of(file: str) -> Iterator[tuple[Change, str]]:
    """(the change, it in words) of every place of a file."""
    for number, line in enumerate((native.SOURCES / file).read_text().split("\n")):
        code = line.partition("//")[0]
        if code.lstrip().startswith("#") or "static_assert" in code:
            continue
        for place in PLACE.finditer(code):
            found = place.group()
            if found == "if (":
                closing = _closing(code, place.end())
                new = None if closing is None else f"{code[: place.end()]}!({code[place.end() : closing]}){code[closing:]}"
            else:
                instead = str(int(found) + 1) if found.isdigit() else SWAPS[found]
                new = code[: place.start()] + instead + code[place.end() :]
            if new is not None:
                yield Change(file, number, new), f"{code.strip()} -> {new.strip()}"


def _closing(code: str, start: int) -> int | None:
    """Where the bracket that opened before `start` closes."""
    depth = 1
    for i in range(start, len(code)):
        depth += {"(": 1, ")": -1}.get(code[i], 0)
        if depth == 0:
            return i
    return None


def id_of(change: Change) -> str:
    """The same for the same change of the same source."""
    text = change.planted((native.SOURCES / change.file).read_text())
    return hashlib.sha256(f"{change.file}\0{text}".encode()).hexdigest()[:16]


def reason_of(change: str) -> str | None:
    """Why no test can kill it; None if that is not known."""
    return next((reason for reason, texts in SAME.items() if any(text in change for text in texts)), None)


def run(found: Path, files: list[str], every: int) -> None:
    """Test the mutants of the files that `found` does not hold, a line of JSON each."""
    settings.load_profile("mutants")  # tests take theirs when they are defined
    found.parent.mkdir(parents=True, exist_ok=True)
    known = {json.loads(line)["id"] for line in found.read_text().splitlines()} if found.exists() else set()
    with Workshop() as workshop:
        assert judged(workshop.library(None), (*FLOATS, *CODES)) == ("survived", "")
        for file in files:
            for change, words in mutants_of(file):
                start, name = time.monotonic(), id_of(change)
                if name in known or int(name, 16) % every:
                    continue
                verdict, by = _verdict(workshop, change)
                line = {"id": name, "file": file, "line": change.line + 1, "change": words, "verdict": verdict, "by": by}
                with found.open("a") as out:
                    out.write(json.dumps({**line, "seconds": round(time.monotonic() - start, 1)}) + "\n")
                print(f"{file}:{change.line + 1} {verdict} {by or words}", flush=True)


def _verdict(workshop: Workshop, change: Change) -> tuple[str, str]:
    try:
        library = workshop.library(change)
    except subprocess.CalledProcessError:
        return "no C++", ""
    tests = CODES if UNITS_OF[change.file] == ("quantised",) else FLOATS
    verdict = judged(library, (*tests, *CODES[:1]) if change.file == "binding.cpp" else tests)
    shutil.rmtree(library.parent)
    return verdict


def report(found: Path) -> str:
    """Markdown: killed and survived, file by file, and why the survivors did."""
    of_file: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in {line["id"]: line for line in map(json.loads, found.read_text().splitlines())}.values():
        if line["verdict"] != "no C++":
            of_file[line["file"]].append(line)
    rows, alive = [], []
    for file, lines in sorted(of_file.items()):
        living = [line for line in lines if line["verdict"] == "survived"]
        same = sum(reason_of(line["change"]) is not None for line in living)
        killed = len(lines) - len(living)
        rows.append(f"| {file} | {len(lines)} | {killed} | {len(living)} | {same} | {100 * killed / max(len(lines) - same, 1):.0f} |")
        alive += living
    head = (
        "| file | mutants | killed | survived | of these the same but for speed | killed of the rest, % |",
        "|---|---:|---:|---:|---:|---:|",
    )
    told = (f"- {line['file']}:{line['line']} `{line['change']}`: {reason_of(line['change']) or 'not known'}" for line in alive)
    return "\n".join(("# Mutants of the C++ kernels", "", *head, *rows, "", "## Survivors", "", *told))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("found", type=Path, help="lines of JSON, one a mutant")
    parser.add_argument("files", nargs="*", default=list(UNITS_OF))
    parser.add_argument("--every", type=int, default=1, help="take one of so many")
    a = parser.parse_intermixed_args()
    print(report(a.found)) if a.what == "report" else run(a.found, a.files or list(UNITS_OF), a.every)
