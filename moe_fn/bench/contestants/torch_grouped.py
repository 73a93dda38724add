"""Contestant written in plain torch: sort, grouped_mm, silu(gate) * up, grouped_mm, weighted sum."""

import functools

import torch
from torch import Tensor

from moe_fn.bench.contestants.entry import (
    Contestant,
    Layer,
    Run,
    activation_name,
    always_installed,
    refuses_weight_on_input,
    trained_leaves,
)
from moe_fn.bench.contestants.routers import refuses_router, route_by_softmax
from moe_fn.bench.problem import Problem, TokenInput

# On a GPU this mode tries Triton's grouped products besides CUTLASS's; CUDA graphs are made by the clock.
COMPILE_MODES = {"cpu": None, "cuda": "max-autotune-no-cudagraphs"}


def experts_by_grouped_mm(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x [T, H], ids and weights [T, k], gate_up [E, 2 I, H], down [E, H, I] -> [T, H]."""
    grouped_mm = torch.nn.functional.grouped_mm
    expert_of_row, slot_of_row = torch.sort(ids.flatten(), stable=True)
    token_of_row = slot_of_row // ids.shape[1]
    ends = torch.searchsorted(expert_of_row, torch.arange(len(gate_up), device=x.device), right=True).to(torch.int32)
    gate, up = grouped_mm(x[token_of_row], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    rows = grouped_mm(torch.nn.functional.silu(gate) * up, down.transpose(1, 2), offs=ends)
    rows = rows * weights.flatten()[slot_of_row, None].to(rows.dtype)
    return torch.zeros_like(x).index_add(0, token_of_row, rows)


def _build(problem: Problem, compiled: bool) -> Layer:
    layer = problem.part == "layer"

    def of_layer(x: Tensor) -> Tensor:
        routing = route_by_softmax(problem, x)
        return experts_by_grouped_mm(
            x, routing.expert_ids, routing.weights, problem.weights.gate_up, problem.weights.down
        )

    mode = COMPILE_MODES[problem.device.type]
    experts = torch.compile(experts_by_grouped_mm, fullgraph=True, mode=mode) if compiled else experts_by_grouped_mm
    block = torch.compile(of_layer, fullgraph=True, mode=mode) if compiled else of_layer

    def bind(token_input: TokenInput) -> Run:
        routing = token_input.routing
        if layer:
            return functools.partial(block, token_input.x)
        matrices = (problem.weights.gate_up, problem.weights.down)
        return functools.partial(experts, token_input.x, routing.expert_ids, routing.weights, *matrices)

    return Layer(bind=bind, leaves=trained_leaves(problem.weights, with_router=layer))


def _refuses(problem: Problem, tokens: int, compiled: bool) -> str | None:
    config, weights = problem.config, problem.weights
    if activation_name(config) != "silu" or config.gate_up_layout != "packed" or config.weight_layout != "out_in":
        return "supports packed gated silu with weights [E, out, in] here"
    if weights.gate_up_bias is not None or weights.down_bias is not None:
        return "has no biases here"
    if compiled and problem.dtype != torch.bfloat16:
        return "torch compiles grouped_mm for bf16 only"
    return refuses_weight_on_input(problem) or refuses_router(problem)


def _row(name: str, compiled: bool) -> Contestant:
    return Contestant(
        name=name,
        installed=always_installed,
        refuses=functools.partial(_refuses, compiled=compiled),
        build=functools.partial(_build, compiled=compiled),
    )


TORCH_GROUPED: tuple[Contestant, ...] = (
    _row("torch grouped_mm", compiled=False),
    _row("torch grouped_mm compiled", compiled=True),
)
