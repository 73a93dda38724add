"""Contestant written in plain torch for quantized experts: a loop over experts with the products that torchao uses on a
CPU.

    int8, a scale for each output:  torch._weight_int8pack_mm(x, codes [out, in], scales [out])
    int4 groups:                    torch._weight_int4pack_mm_for_cpu(x, packed codes, group size, scales and zeros
                                    [groups, out, 2])

Scales are in the dtype of x; in the second, a weight is (code - 8) * scale + zero.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from moe_fn.bench.contestants.entry import (
    Contestant,
    Layer,
    Run,
    activation_name,
    always_installed,
    only_on_cpu_forward,
    refuses_weight_on_input,
)
from moe_fn.bench.contestants.routers import refuses_router, routing_of
from moe_fn.bench.problem import Problem, TokenInput
from moe_fn.quant.codes import codes_of
from moe_fn.quant.numbers import unpack_halves

Product = Callable[[Tensor], Tensor]
_GROUPS = (32, 64, 128, 256)
_OUTPUTS = 16  # sizes must be multiples of it for the int4 product


def _products(problem: Problem, name: str) -> list[Product]:
    """The product of each expert with its gate_up or down."""
    stored = codes_of(problem.weights, name)
    scale = stored.scale.to(problem.dtype)
    experts = range(problem.config.num_experts)
    size = problem.config.quant.group_size if problem.config.quant is not None else None
    if size is None:
        int8 = torch._weight_int8pack_mm
        return [
            functools.partial(_called, int8, (stored.codes[expert], scale[expert, :, 0].contiguous()))
            for expert in experts
        ]
    int4 = torch._weight_int4pack_mm_for_cpu
    scales_and_zeros = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(1, 2).contiguous()
    pack = torch._convert_weight_to_int4pack_for_cpu
    packed = [pack(unpack_halves(stored.codes[expert]).to(torch.int32), 1) for expert in experts]
    return [functools.partial(_called, int4, (packed[expert], size, scales_and_zeros[expert])) for expert in experts]


def _called(function: Callable[..., Tensor], rest: tuple[object, ...], rows: Tensor) -> Tensor:
    return function(rows, *rest)


def experts_by_packed_mm(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: list[Product], down: list[Product]
) -> Tensor:
    """x [T, H], ids and weights [T, k], a product for each expert -> [T, H]."""
    expert_of_row, slot_of_row = torch.sort(ids.flatten(), stable=True)
    visited, counts = torch.unique_consecutive(expert_of_row, return_counts=True)
    y, first = torch.zeros_like(x), 0
    for expert, count in zip(map(int, visited), map(int, counts), strict=True):
        slots = slot_of_row[first : first + count]
        tokens, first = slots // ids.shape[1], first + count
        gate, up = gate_up[expert](x[tokens]).chunk(2, dim=-1)
        rows = down[expert](torch.nn.functional.silu(gate) * up)
        y.index_add_(0, tokens, rows * weights.flatten()[slots, None].to(rows.dtype))
    return y


def _build(problem: Problem) -> Layer:
    gate_up, down = _products(problem, "gate_up"), _products(problem, "down")

    def run(token_input: TokenInput) -> Tensor:
        routing = routing_of(problem, token_input)
        return experts_by_packed_mm(token_input.x, routing.expert_ids, routing.weights, gate_up, down)

    def bind(token_input: TokenInput) -> Run:
        return functools.partial(run, token_input)

    return Layer(bind=bind)


def _refuses(problem: Problem, tokens: int) -> str | None:
    config, weights, quant = problem.config, problem.weights, problem.config.quant
    if activation_name(config) != "silu" or config.gate_up_layout != "packed" or weights.gate_up_bias is not None:
        return "supports packed gated silu without biases here"
    if quant is None or quant.activations is not None or quant.zero_points:
        return "torch's products do not round inputs and have no zero points"
    groups = quant.scheme == "int4" and quant.group_size in _GROUPS
    if not groups and (quant.scheme, quant.granularity) != ("int8", "channel"):
        return "torch has products of int8 with a scale for each output, and of int4 in groups"
    sizes = (config.hidden_size, config.intermediate_size)
    if groups and any(size % (quant.group_size or 1) or size % _OUTPUTS for size in sizes):
        return f"torch's product needs sizes divisible by {quant.group_size}"
    return only_on_cpu_forward(problem) or refuses_weight_on_input(problem) or refuses_router(problem)


PACKED_MM = Contestant(
    name="torch packed_mm",
    installed=always_installed,
    refuses=_refuses,
    build=_build,
    takes="codes",
    copies=1,
    devices=("cpu",),
)
