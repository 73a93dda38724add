"""Mutation testing of the C++ kernels: does a test fail for every small change of a line?  `make mutants-cpp`, or

    python -m tools.mutants.cpp run out/mutants-cpp.jsonl backward.cpp kernels.h      skips mutants that the file has
    python -m tools.mutants.cpp report out/mutants-cpp.jsonl > out/mutants-cpp.md

with PYTHONPATH=.:property_tests.

A mutant is a file of moe_fn/kernels/native/sources with another operator, constant, bound or condition in one place. It
is compiled for one level, loaded by its own process, and tested by the tests that have a level as parameter
(`tools/cpp_changes.py`). `--every 10` takes a tenth of them.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import conftest  # noqa: F401
from hypothesis import settings

from moe_fn.kernels.native import library as native
from tools.cpp_changes import UNITS_OF, Change, Workshop, judged

SWAPS = {
    " < ": " <= ", " <= ": " < ", " > ": " >= ", " >= ": " > ", " == ": " != ", " != ": " == ", " + ": " - ",
    " - ": " + ", " * ": " + ",
    " / ": " * ", " % ": " / ", " += ": " = ", " && ": " || ", " || ": " && ", "std::min": "std::max",
    "std::max": "std::min",
    "true": "false", "false": "true", "first": "last", "gate_up": "down",
}  # fmt: skip
PLACE = re.compile(
    "|".join([*(re.escape(old) for old in sorted(SWAPS, key=len, reverse=True)), r"(?<![\w.])\d+(?![\w.])", r"\bif \("])
)
FLOATS = (
    "test_native_backward.test_slopes_at_the_very_limits_and_kinks",
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
ROUTER = (
    "test_native_router.test_bits_are_those_of_the_stages",
    "test_native_router.test_every_option_at_sizes_of_models",
    "test_native_router.test_any_logits_of_any_dtype_and_stride",
    "test_native_router.test_sizes_at_the_edges_and_rows_of_several_threads",
)
REFUSALS = (
    "test_native.test_wrong_shapes_raise_in_words",
    "test_native_router.test_wrong_arguments_raise_in_words",
    "test_quant_native.test_what_the_kernels_do_not_take_runs_by_stages_and_says_why",
)
# Not mutated: prefetches, allocation of pages, and functions that only the benchmark calls.
SPEED = re.compile(r"__builtin_prefetch|madvise|aligned_alloc|\blarge\b|\bhuge\b|\bpage\b")
BENCHMARKS = re.compile(
    r"^\w+ (?:read_bytes|tile_rate|read_op|gemm_op)\(.*?^\}|^double gemm_op.*?$", re.MULTILINE | re.DOTALL
)
# Reasons why a mutant differs only in speed or memory: (file, text of the line that it changes).
SAME: dict[str, tuple[tuple[str, str], ...]] = {
    "Only the partition of work between threads and its order change.": (
        ("kernels.h", "int rows = std::clamp(256"),
        ("kernels.h", "panels_at_once = int("),
        ("kernels.h", "int64_t parts = "),
        ("kernels.h", "int per = std::clamp(panels"),
        ("kernels.h", "tasks = "),
        ("kernels.h", "per = (panels"),
        ("product.h", "groups = "),
        ("product.h", "return std::max(2 * ROWS_OF<D>, (w.prepared"),
        ("stream.h", "int per = int(std::clamp"),
        ("quantized.h", "512 * 256 / row_dwords"),
    ),
    "At that many rows both ways of computing it are correct.": (("panels.h", "(rows < DOTS_UNTIL"),),
    "A value equal to the limit is the limit.": (("activation.h", "select(f >= a.limit, splat(a.limit), f)"),),
    "The stride after a single expert is not used.": (("binding.cpp", "std::max<int64_t>(t.size(0), 2)"),),
    "Only the place where a sum is split changes, within the limit.": (("codes.h", "const int most = parts == 1"),),
    "The next loop processes what this one leaves.": (("panels.h", "(int64_t(first) + s + WIDTH) * 4 < row_bytes"),),
    "It is an address for prefetching.": (
        ("kernels.h", "next = "),
        ("product.h", "next = "),
        ("product.h", "ahead = "),
        ("product.h", "const int per = (8"),
        ("product.h", "int64_t line = "),
        ("product.h", "bool on = "),
        ("stream.h", "ahead = "),
        ("panels.h", "following = "),
        ("tile.h", "following = "),
        ("quantized.h", "ahead = "),
    ),
    "A buffer is larger than needed.": (
        ("kernels.h", "std::vector<int64_t> to("),
        ("kernels.h", "const int most = "),
        ("kernels.h", " = buffer("),
        ("product.h", " = buffer("),
        ("quantized.cpp", " = buffer("),
    ),
    "Steps come in whole blocks, and an iteration without panels does nothing.": (
        ("kernels.h", "k > 1,"),
        ("kernels.h", "p <= task.last_panel"),
    ),
    "An outer product reads only its number of columns.": (("kernels.h", "const Weight shape{nullptr, 1, n, 0,"),),
}


def mutants_of(file: str, lines: Collection[int]) -> Iterator[tuple[Change, str]]:
    """Yields (change, description) for every place in some lines of a file, except where only speed would change."""
    text = (native.SOURCES / file).read_text()
    timed = {
        n
        for part in BENCHMARKS.finditer(text)
        for n in range(text[: part.start()].count("\n"), text[: part.end()].count("\n") + 1)
    }
    for number, line in enumerate(text.split("\n")):
        code = line.partition("//")[0]
        if (
            number not in lines
            or number in timed
            or code.lstrip().startswith("#")
            or "static_assert" in code
            or SPEED.search(code)
        ):
            continue
        for place in PLACE.finditer(code):
            found = place.group()
            if code[: place.start()].count('"') % 2:
                continue  # text of an error, or names
            if found == "if (":
                closing = _closing(code, place.end())
                new = (
                    None
                    if closing is None
                    else f"{code[: place.end()]}!({code[place.end() : closing]}){code[closing:]}"
                )
            else:
                instead = str(int(found) + 1) if found.isdigit() else SWAPS[found]
                new = code[: place.start()] + instead + code[place.end() :]
            if new is not None:
                yield Change(file, number, new), f"{code.strip()} -> {new.strip()}"


def _closing(code: str, start: int) -> int | None:
    """Returns the index of the bracket that closes the one opened before `start`."""
    depth = 1
    for i in range(start, len(code)):
        depth += {"(": 1, ")": -1}.get(code[i], 0)
        if depth == 0:
            return i
    return None


def id_of(change: Change) -> str:
    """An id that is equal for the same change of the same source."""
    text = change.planted((native.SOURCES / change.file).read_text())
    return hashlib.sha256(f"{change.file}\0{text}".encode()).hexdigest()[:16]


def reason_of(file: str, change: str) -> str | None:
    """Returns the reason why no test can kill a mutant, or None."""
    return next(
        (reason for reason, places in SAME.items() if any(of == file and text in change for of, text in places)), None
    )


def run(found: Path, files: list[str], every: int) -> None:
    """Tests the mutants of the files that `found` does not contain, and appends a line of JSON for each."""
    settings.load_profile("mutants")  # a test takes the profile when it is defined
    found.parent.mkdir(parents=True, exist_ok=True)
    known = {json.loads(line)["id"] for line in found.read_text().splitlines()} if found.exists() else set()
    with Workshop() as workshop:
        assert judged(workshop.library(None), (*FLOATS, *CODES, *ROUTER, *REFUSALS)) == ("survived", "")
        compiled = workshop.lines()
        todo = {id_of(change): (change, words) for file in files for change, words in mutants_of(file, compiled[file])}
        for name in sorted(todo):  # by hash, not by file: a run that ends early has a sample of all files
            if name in known or int(name, 16) % every:
                continue
            start, (change, words) = time.monotonic(), todo[name]
            verdict, by = _verdict(workshop, change)
            line = {
                "id": name,
                "file": change.file,
                "line": change.line + 1,
                "change": words,
                "verdict": verdict,
                "by": by,
            }
            with found.open("a") as out:
                out.write(json.dumps({**line, "seconds": round(time.monotonic() - start, 1)}) + "\n")
            print(f"{change.file}:{change.line + 1} {verdict} {by or words}", flush=True)


def _verdict(workshop: Workshop, change: Change) -> tuple[str, str]:
    try:
        library = workshop.library(change)
    except subprocess.CalledProcessError:
        return "no C++", ""
    if workshop.makes_no_difference(library):
        shutil.rmtree(library.parent)
        return "same", ""
    verdict = judged(library, _tests_of(UNITS_OF[change.file]))
    shutil.rmtree(library.parent)
    return verdict


def _tests_of(units: tuple[str, ...]) -> tuple[str, ...]:
    if "quantized" in units:
        return CODES
    if "router" in units:
        return ROUTER
    return (*FLOATS, *CODES, *ROUTER, *REFUSALS) if "binding" in units else FLOATS


def report(found: Path) -> str:
    """Returns Markdown: counts of killed and survived by file, and reasons of survivors."""
    of_file: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in {line["id"]: line for line in map(json.loads, found.read_text().splitlines())}.values():
        if line["verdict"] != "no C++":
            of_file[line["file"]].append(line)
    rows, alive, everything = [], [], [line for lines in of_file.values() for line in lines]
    for file, lines in (*sorted(of_file.items()), ("**all**", everything)):
        living = [line for line in lines if line["verdict"] == "survived"]
        known = sum(reason_of(line["file"], line["change"]) is not None for line in living)
        same, killed = (sum(line["verdict"] == verdict for line in lines) for verdict in ("same", "killed"))
        part = 100 * killed / max(killed + len(living) - known, 1)
        rows.append(f"| {file} | {len(lines)} | {same} | {killed} | {len(living)} | {known} | {part:.0f} |")
        alive += living if file in of_file else []
    head = (
        "| file | mutants | the same object code | killed | survived | of these with a reason below | killed of the "
        "rest, % |",
        "|---|---:|---:|---:|---:|---:|---:|",
    )
    reasons = [
        f"- {line['file']}:{line['line']} `{line['change']}`: {reason_of(line['file'], line['change'])}"
        for line in alive
    ]
    return "\n".join(("## The C++ kernels", "", *head, *rows, "", *reasons))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("found", type=Path, help="lines of JSON, one a mutant")
    parser.add_argument("files", nargs="*", default=list(UNITS_OF))
    parser.add_argument("--every", type=int, default=1, help="take one of so many")
    a = parser.parse_intermixed_args()
    print(report(a.found)) if a.what == "report" else run(a.found, a.files or list(UNITS_OF), a.every)
