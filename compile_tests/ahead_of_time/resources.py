"""The resources of a compiled kernel: registers, spills, shared memory and matrix instructions."""

import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compile_tests.ahead_of_time.case import Case
from moe_fn.kernels.triton.tile_tables import ARCHITECTURES

TARGETS: dict[str, GPUTarget] = {
    **{f"sm_{number}": GPUTarget("cuda", number, 32) for number in (75, 80, 89, 90, 100)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
INSTRUCTIONS: dict[str, str] = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "mfma": r"\bv_mfma",
}


@dataclass(frozen=True)
class Resources:
    """Registers and spilled bytes of one thread, bytes of shared memory of one program."""

    registers: int
    spilled: int
    shared: int
    instructions: Mapping[str, int]
    seconds: float


def compiled(case: Case, arch: str) -> Resources:
    """Compiles the case for the architecture. Raises the errors of the compiler."""
    names = case.kernel.arg_names
    given = set(case.types) | set(case.constants)
    if given != set(names):
        raise ValueError(
            f"{case.name}: arguments missing: {sorted(set(names) - given)}, unknown: {sorted(given - set(names))}"
        )
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.types.get(name, "constexpr") for name in names},
        constexprs=dict(case.constants),
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if name in case.types and name not in case.unaligned
        },
    )
    start = time.perf_counter()
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": case.fusion}
    kernel = triton.compile(source, target=TARGETS[arch], options=options)
    seconds = round(time.perf_counter() - start, 2)
    registers, spilled, static = (
        _of_amd(kernel.asm["amdgcn"]) if arch.startswith("gfx") else _of_nvidia(kernel.asm["cubin"])
    )
    text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    counts = {name: len(re.findall(pattern, text)) for name, pattern in INSTRUCTIONS.items()}
    return Resources(
        registers, spilled, static + kernel.metadata.shared, {name: n for name, n in counts.items() if n}, seconds
    )


def _of_nvidia(cubin: bytes) -> tuple[int, int, int]:
    """Returns registers, spilled bytes and static shared memory. Raises ValueError if cuobjdump does not list the
    kernel.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def dumped(flag: str) -> str:
            return subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout

        text = dumped("--dump-resource-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
        if found is None:
            raise ValueError(f"cuobjdump lists no resources: {text}")
        registers, stack, static, local = (int(number) for number in found.groups())
        # ptxas may leave a frame of 8 bytes that no instruction uses (the router with groups).
        spilled = stack + local if stack + local and re.search(r"\b(?:STL|LDL)\b", dumped("-sass")) else 0
    # sm_90 and later report 1024 bytes that the system reserves outside the limit
    return registers, spilled, static % 1024


def _of_amd(assembly: str) -> tuple[int, int, int]:
    """Returns the same for AMD, from the metadata in the assembly; scratch counts as spilled. Static shared memory is
    included in Triton's own number.
    """
    number = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    spilled = 4 * (number["vgpr_spill_count"] + number["sgpr_spill_count"]) + number["private_segment_fixed_size"]
    return number["vgpr_count"], spilled, 0


def faults(case: Case, found: Resources, arch: str) -> tuple[str, ...]:
    """Returns the faults of a compiled case as messages."""
    limit = ARCHITECTURES[arch].shared_memory
    unit = _matrix_unit(case, arch)
    rounds = case.dtype == "fp32" and case.product and not arch.startswith("gfx") and bool(found.instructions)
    checks = (
        (found.spilled > 0, f"spills {found.spilled} bytes"),
        (found.shared > limit, f"takes {found.shared} bytes of shared memory; {arch} has {limit}"),
        (
            found.shared > case.bound,
            f"takes {found.shared} bytes of shared memory; tiles.shared_memory expects at most {case.bound}",
        ),
        (unit is not None and unit not in found.instructions, f"computes without {unit}"),
        (rounds, f"computes float32 with {', '.join(found.instructions)}, which round it"),
    )
    return tuple(text for wrong, text in checks if wrong)


def _matrix_unit(case: Case, arch: str) -> str | None:
    """Returns the matrix instruction that a product must use; None in float32 on NVIDIA, whose units are not exact."""
    if not case.product or case.tile is None or (case.dtype == "fp32" and not arch.startswith("gfx")):
        return None
    if arch.startswith("gfx"):
        return "mfma"
    whole = case.tile.rows >= 64
    return {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(arch, "mma") if whole else None
