"""What the Triton kernels take of four GPUs, without one: no spills, within shared memory, on the matrix units, and no
more than before.

python -m compile_tests.test_triton_ahead_of_time --write-budgets      after a change that moves the numbers on purpose
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
BUDGETS = Path(__file__).parent / "triton_budgets.json"
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
# registers a thread: the assembler's choice moves by so many with a patch release, and occupancy changes in steps of 8
SLACK = 8


def compiled(arch: str, path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and report of the command, in a process where triton compiles and does not interpret."""
    command = [
        "env",
        "-u",
        "TRITON_INTERPRET",
        sys.executable,
        "-m",
        "compile_tests.ahead_of_time",
        "--arch",
        arch,
        "--json",
        str(path),
        *arguments,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert path.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(path.read_text())


def excesses(report: dict[str, Any], budgets: dict[str, Any]) -> list[str]:
    """Where a report is worse than the budgets; registers are compared for the version of triton that the budgets are
    from.
    """
    of_arch = budgets["cases"][report["arch"]]
    found = [f"{name}: {fault}" for name, row in report["cases"].items() for fault in row["faults"]]
    if report["triton"] != budgets["triton"]:
        return found
    found += [f"{name}: no such case any more" for name in of_arch.keys() - set(report["names"])]
    for name, row in report["cases"].items():
        if name not in of_arch:
            found.append(f"{name}: has no budget; write them again")
        elif "registers" in row:
            registers, shared = of_arch[name]
            if row["registers"] > registers + SLACK:
                found.append(f"{name}: {row['registers']} registers; budget {registers}")
            if row["shared"] > shared:
                found.append(f"{name}: {row['shared']} bytes of shared memory; budget {shared}")
    return found


# A fifth of the cases of each architecture, another one for each, so that a change meets most; all take seven minutes
# from an empty cache.
PARTS = [(arch, part) for part in range(5) for arch in ARCHS]
OFTEN = {(arch, number) for number, arch in enumerate(ARCHS)}


@pytest.mark.parametrize(
    ("arch", "part"), [pytest.param(*case, marks=[] if case in OFTEN else [pytest.mark.thorough]) for case in PARTS]
)
def test_every_kernel_with_every_tile_is_within_its_budget(arch: str, part: int, tmp_path: Path) -> None:
    status, report = compiled(arch, tmp_path / "report.json", "--part", f"{part + 1}/5")
    assert len(report["cases"]) > 30 and len(report["names"]) > 150
    assert excesses(report, json.loads(BUDGETS.read_text())) == []
    assert status == 0


def test_tiles_that_are_known_to_be_bad_are_reported(tmp_path: Path) -> None:
    """Four warps hold a tile of 128 x 256 only in part, and eight stages of it are too many."""
    status, report = compiled("sm_90", tmp_path / "report.json", "--planted")
    spilled, over = (row["faults"] for row in report["cases"].values())
    assert status == 1
    assert any("spills" in fault for fault in spilled)
    assert any("of shared memory; sm_90 has 232448" in fault for fault in over)


def test_a_report_that_is_worse_than_its_budget_is_an_excess() -> None:
    row = {"registers": 100, "shared": 1000, "faults": []}
    budgets = {"triton": "1", "cases": {"sm_90": {"a": [100, 1000]}}}

    def found(row: dict[str, Any], version: str = "1") -> list[str]:
        return excesses({"triton": version, "arch": "sm_90", "names": ["a"], "cases": {"a": row}}, budgets)

    assert found(row) == found({**row, "registers": 100 + SLACK}) == []
    assert found({**row, "registers": 101 + SLACK}) == ["a: 109 registers; budget 100"]
    assert found({**row, "shared": 1001}) == ["a: 1001 bytes of shared memory; budget 1000"]
    assert found({**row, "registers": 255, "faults": ["spills 4 bytes"]}, version="2") == ["a: spills 4 bytes"]


def write_budgets(path: Path, folder: Path) -> None:
    """Compiles for all architectures and writes what they take, one case a line."""
    reports = [compiled(arch, folder / f"{arch}.json")[1] for arch in ARCHS]
    faults = [
        f"{report['arch']} {name}: {row['faults']}"
        for report in reports
        for name, row in report["cases"].items()
        if row["faults"]
    ]
    if faults:
        sys.exit("\n".join(["not written:", *faults]))
    archs = []
    for report in reports:
        lines = [
            f"   {json.dumps(name)}: [{row['registers']}, {row['shared']}]" for name, row in report["cases"].items()
        ]
        archs.append(f'  "{report["arch"]}": {{\n' + ",\n".join(lines) + "\n  }")
    version = reports[0]["triton"]
    path.write_text(
        f'{{\n "triton": "{version}",\n "is": "registers a thread, bytes of shared memory",\n "cases": {{\n'
    )
    with path.open("a") as file:
        file.write(",\n".join(archs) + "\n }\n}\n")


if __name__ == "__main__":
    import tempfile

    if sys.argv[1:] != ["--write-budgets"]:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as name:
        write_budgets(BUDGETS, Path(name))
