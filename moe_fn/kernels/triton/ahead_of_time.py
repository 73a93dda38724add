"""python -m moe_fn.kernels.triton.ahead_of_time --arch sm_90: what each kernel takes of a GPU, on a machine without one.

Compiles every case of ahead_of_time_cases for the architecture and reads registers, spills, shared memory and the matrix
instructions from the result. Exits with 1 if a case does not compile, spills, needs more shared memory than there is, or computes
without the matrix unit that it should use. Needs nothing but the triton wheel, which brings assembler and disassembler.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_fn.kernels.triton.tile_tables import ARCHITECTURES, Tile

TARGETS: dict[str, GPUTarget] = {
    **{f"sm_{number}": GPUTarget("cuda", number, 32) for number in (75, 80, 89, 90, 100)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
INSTRUCTIONS: dict[str, str] = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma": r"\bmma\.sync", "mfma": r"\bv_mfma"}


@dataclass(frozen=True)
class Case:
    """A kernel with types for its arguments ("*bf16", "i32") and values for its constants; tile: for those that heuristics choose."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    tile: Tile | None = None
    dtype: str = "bf16"
    product: bool = False  # has a tl.dot of its dtype
    unaligned: frozenset[str] = frozenset()  # arguments that need not be multiples of 16: pointers into a tensor, counts of tiles
    fusion: bool = True  # of multiplications with additions
    bound: int = 1 << 30  # bytes of shared memory that the heuristics expect at most


@dataclass(frozen=True)
class Resources:
    """Of one thread: registers, and bytes that did not fit them; of one program: bytes of shared memory."""

    registers: int
    spilled: int
    shared: int
    instructions: Mapping[str, int]
    seconds: float


def compiled(case: Case, arch: str) -> Resources:
    """The case, compiled for the architecture; raises what the compiler raises."""
    names = case.kernel.arg_names
    given = set(case.types) | set(case.constants)
    if given != set(names):
        raise ValueError(f"{case.name}: arguments missing: {sorted(set(names) - given)}, unknown: {sorted(given - set(names))}")
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.types.get(name, "constexpr") for name in names},
        constexprs=dict(case.constants),
        attrs={
            (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in case.types and name not in case.unaligned
        },
    )
    start = time.perf_counter()
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": case.fusion}
    kernel = triton.compile(source, target=TARGETS[arch], options=options)
    seconds = round(time.perf_counter() - start, 2)
    registers, spilled, static = _of_amd(kernel.asm["amdgcn"]) if arch.startswith("gfx") else _of_nvidia(kernel.asm["cubin"])
    text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    counts = {name: len(re.findall(pattern, text)) for name, pattern in INSTRUCTIONS.items()}
    return Resources(registers, spilled, static + kernel.metadata.shared, {name: n for name, n in counts.items() if n}, seconds)


def _of_nvidia(cubin: bytes) -> tuple[int, int, int]:
    """Registers, spilled bytes and static shared memory; without its line the kernel is not known, and that is an error."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def dumped(flag: str) -> str:
            return subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout

        text = dumped("--dump-resource-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
        if found is None:
            raise ValueError(f"cuobjdump tells no resources: {text}")
        registers, stack, static, local = (int(number) for number in found.groups())
        # ptxas may leave a frame of 8 bytes that no instruction touches (the router with groups).
        spilled = stack + local if stack + local and re.search(r"\b(?:STL|LDL)\b", dumped("-sass")) else 0
    return registers, spilled, static % 1024  # sm_90 and later report the 1024 bytes that the system has beside the limit


def _of_amd(assembly: str) -> tuple[int, int, int]:
    """As of NVIDIA, from the metadata in the assembly; scratch counts as spilled (static shared memory is in Triton's own number)."""
    number = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    spilled = 4 * (number["vgpr_spill_count"] + number["sgpr_spill_count"]) + number["private_segment_fixed_size"]
    return number["vgpr_count"], spilled, 0


def faults(case: Case, found: Resources, arch: str) -> tuple[str, ...]:
    """What is wrong with a compiled case, in words; empty if nothing is."""
    limit = ARCHITECTURES[arch].shared_memory
    unit = _matrix_unit(case, arch)
    rounds = case.dtype == "fp32" and case.product and not arch.startswith("gfx") and bool(found.instructions)
    checks = (
        (found.spilled > 0, f"spills {found.spilled} bytes"),
        (found.shared > limit, f"takes {found.shared} bytes of shared memory; {arch} has {limit}"),
        (found.shared > case.bound, f"takes {found.shared} bytes of shared memory; tiles.shared_memory expects at most {case.bound}"),
        (unit is not None and unit not in found.instructions, f"computes without {unit}"),
        (rounds, f"computes float32 with {', '.join(found.instructions)}, which round it"),
    )
    return tuple(text for wrong, text in checks if wrong)


def _matrix_unit(case: Case, arch: str) -> str | None:
    """What a product must be computed with. float32 is exact, and NVIDIA's matrix units are not."""
    if not case.product or case.tile is None or (case.dtype == "fp32" and not arch.startswith("gfx")):
        return None
    if arch.startswith("gfx"):
        return "mfma"
    whole = case.tile.rows >= 64
    return {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(arch, "mma") if whole else None


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 if a case has a fault."""
    from moe_fn.kernels.triton.ahead_of_time_cases import cases_of

    parser = argparse.ArgumentParser(prog="python -m moe_fn.kernels.triton.ahead_of_time", description=__doc__)
    parser.add_argument("--arch", default="sm_90", choices=sorted(TARGETS))
    parser.add_argument("--only", default="", help="cases whose names hold this text")
    parser.add_argument("--part", default="1/1", help="2/3: every third case, from the second on")
    parser.add_argument("--planted", action="store_true", help="compile tiles that are known to be bad instead")
    parser.add_argument("--thorough", action="store_true", help="every form of quantised weights in every tile: some minutes more")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("triton interprets kernels in this process (TRITON_INTERPRET is set) and so does not compile them")
    rows: dict[str, dict[str, Any]] = {}
    part, parts = (int(number) for number in options.part.split("/"))
    cases = list(cases_of(options.arch, planted=options.planted, thorough=options.thorough))
    for case in cases[part - 1 :: parts]:
        if options.only in case.name:
            rows[case.name] = _row(case, options.arch)
            print(_line(case.name, rows[case.name]), flush=True)
    if options.json is not None:
        report = {"triton": triton.__version__, "arch": options.arch, "names": [case.name for case in cases], "cases": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(row["faults"] for row in rows.values()))


def _row(case: Case, arch: str) -> dict[str, Any]:
    """A case's resources and faults; that it does not compile is a fault too."""
    try:
        found = compiled(case, arch)
    except Exception as error:  # whatever the compiler meets: the other cases are still worth their line
        lines = str(error).strip().splitlines() or [""]
        return {"faults": [f"does not compile: {type(error).__name__}: {lines[-1][:300]}"]}
    return {**asdict(found), "faults": list(faults(case, found, arch))}


def _line(name: str, row: Mapping[str, Any]) -> str:
    if "registers" not in row:
        return f"{name:58} {'; '.join(row['faults'])}"
    units = " ".join(f"{unit} {count}" for unit, count in row["instructions"].items())
    wrong = "".join(f"  ! {fault}" for fault in row["faults"])
    return f"{name:58} registers {row['registers']:3} shared {row['shared']:6} {units:22} {row['seconds']:5.1f} s{wrong}"


if __name__ == "__main__":
    sys.exit(main())
