"""python -m compile_tests.ahead_of_time --arch sm_90: the resources of each kernel, on a machine without a GPU.

Compiles every case of compile_tests.ahead_of_time.cases for the architecture and reads registers, spills, shared memory
and the matrix instructions from the result. Exits with 1 if a case does not compile, spills, needs more shared memory
than the GPU has, or does not use the matrix unit that it should. Needs only the triton wheel, which has assembler and
disassembler.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from compile_tests.ahead_of_time.case import Case
from compile_tests.ahead_of_time.cases import cases_of
from compile_tests.ahead_of_time.digests import digest_of
from compile_tests.ahead_of_time.resources import TARGETS, compiled, faults


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns 1 if a case has a fault."""
    parser = argparse.ArgumentParser(prog="python -m compile_tests.ahead_of_time", description=__doc__)
    parser.add_argument("--arch", default=["sm_90"], nargs="+", choices=sorted(TARGETS))
    parser.add_argument("--only", default="", help="cases whose names hold this text")
    parser.add_argument("--part", default="1/1", help="2/3: every third case, from the second on")
    parser.add_argument("--changed-since", type=Path, help="budgets: skip cases with their digests, but for a sample")
    parser.add_argument("--planted", action="store_true", help="compile tiles that are known to be bad instead")
    parser.add_argument(
        "--thorough", action="store_true", help="every form of quantized weights in every tile: some minutes more"
    )
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("triton interprets kernels in this process (TRITON_INTERPRET is set) and so does not compile them")
    part, parts = (int(number) for number in options.part.split("/"))
    archs: dict[str, dict[str, Any]] = {}
    for number, arch in enumerate(options.arch):
        cases = list(cases_of(arch, planted=options.planted, thorough=options.thorough))
        chosen = [case for case in cases[part - 1 :: parts] if options.only in case.name]
        if options.changed_since is not None:
            chosen = changed(chosen, json.loads(options.changed_since.read_text()), arch, number)
        rows: dict[str, dict[str, Any]] = {}
        for case in chosen:
            rows[case.name] = _row(case, arch)
            print(_line(case.name, rows[case.name]), flush=True)
        archs[arch] = {"names": [case.name for case in cases], "cases": rows}
    if options.json is not None:
        report = {"triton": triton.__version__, "archs": archs}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(row["faults"] for of_arch in archs.values() for row in of_arch["cases"].values()))


MOST, SAMPLED = 40, 50


def changed(cases: list[Case], budgets: Mapping[str, Any], arch: str, number: int) -> list[Case]:
    """Returns cases whose digests differ from the budgets, at most MOST of them, and every SAMPLED-th of the others.

    number: of the architecture; each takes other cases, so that a change of all kernels compiles most of them.
    """
    if budgets["triton"] != triton.__version__:
        return cases[number :: max(1, len(cases) // MOST)]
    of_arch = budgets["cases"][arch]
    same = [case for case in cases if case.name in of_arch and of_arch[case.name][2] == digest_of(case)]
    names = {case.name for case in same}
    other = [case for case in cases if case.name not in names]
    return other[number % max(1, len(other) // MOST) :: max(1, len(other) // MOST)] + same[number::SAMPLED]


def _row(case: Case, arch: str) -> dict[str, Any]:
    """Returns a case's resources and faults; a failed compilation is a fault too."""
    try:
        found = compiled(case, arch)
    except Exception as error:  # any error of the compiler; the other cases are reported too
        lines = str(error).strip().splitlines() or [""]
        return {"faults": [f"does not compile: {type(error).__name__}: {lines[-1][:300]}"]}
    return {**asdict(found), "faults": list(faults(case, found, arch)), "digest": digest_of(case)}


def _line(name: str, row: Mapping[str, Any]) -> str:
    if "registers" not in row:
        return f"{name:58} {'; '.join(row['faults'])}"
    units = " ".join(f"{unit} {count}" for unit, count in row["instructions"].items())
    wrong = "".join(f"  ! {fault}" for fault in row["faults"])
    return (
        f"{name:58} registers {row['registers']:3} shared {row['shared']:6} {units:22} {row['seconds']:5.1f} s{wrong}"
    )


if __name__ == "__main__":
    sys.exit(main())
