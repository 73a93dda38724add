"""The ops of moe_fn whose names end in `_triton`, by the kernels of this package: arguments as the schemas have them."""

from typing import Any

import torch
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.config.activation import activation_of_scalars
from moe_fn.kernels.triton import top_k
from moe_fn.kernels.triton.grouped import grouped_matmul, grouped_outer
from moe_fn.kernels.triton.layer import Problem, backward, forward

__all__ = ["grouped_matmul", "grouped_outer", "route_top_k", "routed_experts", "routed_experts_backward"]


def route_top_k(logits: Tensor, correction_bias: Tensor | None, config: MoEConfig) -> tuple[Tensor, Tensor]:
    """moe_fn::route_top_k_triton, its config parsed; ids and weights."""
    return top_k.route_top_k(config, logits, correction_bias)


def routed_experts(*args: Any) -> tuple[Tensor, Tensor]:
    """moe_fn::routed_experts_triton."""
    *arguments, keep = args
    return forward(_problem(*arguments), keep)


def routed_experts_backward(gradient: Tensor, needed: list[bool], pre: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """moe_fn::routed_experts_backward_triton."""
    found = backward(_problem(*args), gradient, pre, tuple(needed), transposed=args[8])
    likes = (args[0], *args[2:7])
    return tuple(gradient.new_empty(0) if g is None or like is None else g.to(like.dtype) for g, like in zip(found, likes, strict=True))


def _problem(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, intermediate_size: int, transposed: bool, function: Any, gated: bool, interleaved: bool, alpha: float,
    up_offset: float, limit: float | None, limit_output: bool, gate_cap: float | None, up_cap: float | None,
) -> Problem:  # fmt: skip
    return Problem(
        x=x.contiguous(),
        expert_ids=expert_ids.contiguous(),
        expert_weights=expert_weights.to(torch.float32).contiguous(),
        gate_up=gate_up.mT if transposed else gate_up,
        down=down.mT if transposed else down,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        activation=activation_of_scalars(function, gated, alpha, up_offset, limit, limit_output, gate_cap, up_cap),
        interleaved=interleaved,
    )
