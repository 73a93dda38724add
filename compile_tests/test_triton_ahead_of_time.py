"""Resources of the Triton kernels, compiled for four GPUs without one: no spills, shared memory within the
limit, matrix units in use, and no more than the budgets.

python -m compile_tests.test_triton_ahead_of_time --write-budgets after a change of kernels or of their
numbers
"""

import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
BUDGETS = Path(__file__).parent / "triton_budgets.json"
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
# registers per thread: patch releases of the assembler differ by up to 8, and occupancy changes in steps of 8
SLACK = 8


def compiled(archs: tuple[str, ...], path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Returns exit status and report of the command, in a process in which triton compiles instead of interpreting."""
    command = [
        "env",
        "-u",
        "TRITON_INTERPRET",
        sys.executable,
        "-m",
        "compile_tests.ahead_of_time",
        "--arch",
        *archs,
        "--json",
        str(path),
        *arguments,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert path.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(path.read_text())


def excesses(report: dict[str, Any], budgets: dict[str, Any]) -> list[str]:
    """Returns the cases of a report that exceed the budgets; registers are compared for the triton version of
    the budgets only.
    """
    found = []
    for arch, of_arch in report["archs"].items():
        found += [f"{arch} {name}: {fault}" for name, row in of_arch["cases"].items() for fault in row["faults"]]
        if report["triton"] == budgets["triton"]:
            known = budgets["cases"][arch]
            found += [f"{arch} {name}: no such case any more" for name in known.keys() - set(of_arch["names"])]
            found += [
                f"{arch} {name}: has no budget; write them again" for name in set(of_arch["names"]) - known.keys()
            ]
            found += [
                f"{arch} {name}: {fault}"
                for name, row in of_arch["cases"].items()
                if name in known and "registers" in row
                for fault in _above(row, *known[name][:2])
            ]
    return found


def _above(row: dict[str, Any], registers: int, shared: int) -> list[str]:
    found = []
    if row["registers"] > registers + SLACK:
        found.append(f"{row['registers']} registers; budget {registers}")
    if row["shared"] > shared:
        found.append(f"{row['shared']} bytes of shared memory; budget {shared}")
    return found


def test_kernels_that_changed_are_within_their_budgets(tmp_path: Path) -> None:
    """Compiles cases with other code, types or constants than the budgets, and always some of each architecture."""
    status, report = compiled(ARCHS, tmp_path / "report.json", "--changed-since", str(BUDGETS))
    assert all(len(of_arch["cases"]) >= 3 and len(of_arch["names"]) > 150 for of_arch in report["archs"].values())
    assert excesses(report, json.loads(BUDGETS.read_text())) == []
    assert status == 0


# A fifth of the cases of each architecture at a time; all take seven minutes from an empty cache.
@pytest.mark.thorough
@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_with_every_tile_is_within_its_budget(arch: str, part: int, tmp_path: Path) -> None:
    status, report = compiled((arch,), tmp_path / "report.json", "--part", f"{part + 1}/5")
    of_arch = report["archs"][arch]
    assert len(of_arch["cases"]) > 30 and len(of_arch["names"]) > 150
    assert excesses(report, json.loads(BUDGETS.read_text())) == []
    assert status == 0


def test_tiles_that_are_known_to_be_bad_are_reported(tmp_path: Path) -> None:
    """A tile of 128 x 256 spills with four warps, and exceeds shared memory with eight stages."""
    status, report = compiled(("sm_90",), tmp_path / "report.json", "--planted")
    spilled, over = (row["faults"] for row in report["archs"]["sm_90"]["cases"].values())
    assert status == 1
    assert any("spills" in fault for fault in spilled)
    assert any("of shared memory; sm_90 has 232448" in fault for fault in over)


def test_a_report_that_is_worse_than_its_budget_is_an_excess() -> None:
    row = {"registers": 100, "shared": 1000, "faults": []}
    budgets = {"triton": "1", "cases": {"sm_90": {"a": [100, 1000, "0"]}}}

    def found(row: dict[str, Any], version: str = "1") -> list[str]:
        return excesses({"triton": version, "archs": {"sm_90": {"names": ["a"], "cases": {"a": row}}}}, budgets)

    assert found(row) == found({**row, "registers": 100 + SLACK}) == []
    assert found({**row, "registers": 101 + SLACK}) == ["sm_90 a: 109 registers; budget 100"]
    assert found({**row, "shared": 1001}) == ["sm_90 a: 1001 bytes of shared memory; budget 1000"]
    assert found({**row, "registers": 255, "faults": ["spills 4 bytes"]}, version="2") == ["sm_90 a: spills 4 bytes"]


def test_a_digest_is_of_the_code_the_types_and_the_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    from compile_tests.ahead_of_time.cases import cases_of
    from compile_tests.ahead_of_time.digests import _code, digest_of
    from moe_fn.kernels.triton import activation

    case = next(iter(cases_of("sm_90")))
    digest = digest_of(case)
    assert digest == digest_of(next(iter(cases_of("sm_90")))) != digest_of(replace(case, warps=2 * case.warps))
    name, value = next(iter(case.constants.items()))
    assert digest_of(replace(case, constants={**case.constants, name: f"not {value}"})) != digest
    _code.cache_clear()  # the kernel calls the activation through another function
    monkeypatch.setattr(inspect, "getsource", lambda f, own=inspect.getsource: own(f).replace("tl.sigmoid", "tl.exp"))
    assert "sigmoid" in Path(activation.__file__).read_text() and digest_of(case) != digest
    _code.cache_clear()


def write_budgets(path: Path, folder: Path) -> None:
    """Compiles for all architectures and writes their resources, one case a line."""
    report = compiled(ARCHS, folder / "report.json")[1]
    faults = [
        f"{arch} {name}: {row['faults']}"
        for arch, of_arch in report["archs"].items()
        for name, row in of_arch["cases"].items()
        if row["faults"]
    ]
    if faults:
        sys.exit("\n".join(["not written:", *faults]))
    archs = []
    for arch, of_arch in report["archs"].items():
        lines = [
            f"   {json.dumps(name)}: {json.dumps([row['registers'], row['shared'], row['digest']])}"
            for name, row in of_arch["cases"].items()
        ]
        archs.append(f'  "{arch}": {{\n' + ",\n".join(lines) + "\n  }")
    version = report["triton"]
    what = "registers a thread, bytes of shared memory, digest of code, types and constants"
    path.write_text(f'{{\n "triton": "{version}",\n "is": "{what}",\n "cases": {{\n')
    with path.open("a") as file:
        file.write(",\n".join(archs) + "\n }\n}\n")


if __name__ == "__main__":
    import tempfile

    if sys.argv[1:] != ["--write-budgets"]:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as name:
        write_budgets(BUDGETS, Path(name))
