"""The ops of moe_fn whose names end in `_triton`, by the kernels of this package: arguments as the schemas
have them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_fn.config import MoEConfig, QuantConfig
from moe_fn.config.activation import activation_of_scalars
from moe_fn.config.quant import quant_of_json
from moe_fn.kernels.triton import top_k
from moe_fn.kernels.triton.grouped import grouped_matmul, grouped_outer, quantized_matmul
from moe_fn.kernels.triton.layer import Problem, backward, forward
from moe_fn.kernels.triton.quant import layer
from moe_fn.kernels.triton.quant.matrix import matrix_of
from moe_fn.quant.codes import Codes

__all__ = [
    "grouped_matmul",
    "grouped_outer",
    "quantized_matmul",
    "route_top_k",
    "routed_experts",
    "routed_experts_backward",
]


def route_top_k(logits: Tensor, correction_bias: Tensor | None, config: MoEConfig) -> tuple[Tensor, Tensor]:
    """moe_fn::route_top_k_triton, its config parsed; ids and weights."""
    return top_k.route_top_k(config, logits, correction_bias)


def routed_experts(*args: Any) -> tuple[Tensor, Tensor]:
    """moe_fn::routed_experts_triton."""
    *arguments, quant, invariant, keep = args
    if quant:
        return layer.forward(_quant_problem(quant_of_json(quant), arguments, invariant), keep)
    return forward(_problem(arguments, invariant), keep)


def routed_experts_backward(gradient: Tensor, needed: list[bool], pre: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """moe_fn::routed_experts_backward_triton; weights are floats."""
    found = backward(_problem(args[:-2], args[-1]), gradient, pre, tuple(needed), transposed=args[_TRANSPOSED])
    likes = (args[0], *args[2:7])
    return tuple(
        gradient.new_empty(0) if g is None or like is None else g.to(like.dtype)
        for g, like in zip(found, likes, strict=True)
    )


_SCALARS = 15  # the arguments that are tensors come first
_TRANSPOSED = _SCALARS + 1


def _shared(arguments: Sequence[Any], invariant: bool) -> dict[str, Any]:
    """What floats and codes have in common."""
    x, expert_ids, expert_weights, _, _, gate_up_bias, down_bias = arguments[:7]
    _, _, function, gated, interleaved, *numbers = arguments[_SCALARS:]
    return {
        "x": x.contiguous(),
        "expert_ids": expert_ids.contiguous(),
        "expert_weights": expert_weights.to(torch.float32).contiguous(),
        "gate_up_bias": gate_up_bias,
        "down_bias": down_bias,
        "activation": activation_of_scalars(function, gated, *numbers),
        "interleaved": interleaved,
        "invariant": invariant,
    }


def _problem(arguments: Sequence[Any], invariant: bool) -> Problem:
    gate_up, down = (t.mT if arguments[_TRANSPOSED] else t for t in arguments[3:5])
    return Problem(gate_up=gate_up, down=down, **_shared(arguments, invariant))


def _quant_problem(quant: QuantConfig, arguments: Sequence[Any], invariant: bool) -> layer.QuantProblem:
    scales, zeros, above, static = (arguments[first : first + 2] for first in range(7, _SCALARS, 2))
    shared = _shared(arguments, invariant)
    halves = 1 if shared["interleaved"] else shared["activation"].gate_up_parts
    gate_up, down = (
        matrix_of(quant, Codes(codes=codes, scale=scale, zero_point=zero, global_scale=factor), parts)
        for codes, scale, zero, factor, parts in zip(arguments[3:5], scales, zeros, above, (halves, 1), strict=True)
    )
    return layer.QuantProblem(
        gate_up=gate_up,
        down=down,
        rounding=quant.activations,
        gate_up_input_scale=static[0],
        down_input_scale=static[1],
        **shared,
    )
