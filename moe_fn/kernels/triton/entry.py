"""The ops of moe_fn whose names end in `_triton`, by the kernels of this package: arguments as the schemas
have them.
"""

from typing import Any

import torch
from torch import Tensor

from moe_fn.config import config_of_json
from moe_fn.config.quant import quant_of_json
from moe_fn.kernels.arguments import ARGUMENTS, DIFFERENTIABLE, RoutedExpertsArguments, arguments_of
from moe_fn.kernels.triton import top_k
from moe_fn.kernels.triton.grouped import grouped_matmul, grouped_outer, quantized_matmul
from moe_fn.kernels.triton.layer import Problem, backward, forward
from moe_fn.kernels.triton.quant import layer
from moe_fn.kernels.triton.quant.matrix import matrix_of
from moe_fn.quant.codes import with_scales

__all__ = [
    "grouped_matmul",
    "grouped_outer",
    "quantized_matmul",
    "route_top_k",
    "routed_experts",
    "routed_experts_backward",
]


def route_top_k(logits: Tensor, correction_bias: Tensor | None, config: str) -> tuple[Tensor, Tensor]:
    """moe_fn::route_top_k_triton: weights and ids."""
    ids, weights = top_k.route_top_k(config_of_json(config), logits, correction_bias)
    return weights, ids


def routed_experts(*args: Any) -> tuple[Tensor, Tensor]:
    """moe_fn::routed_experts_triton."""
    arguments, keep = arguments_of(args[:-1]), args[-1]
    if arguments.quant:
        return layer.forward(_quant_problem(arguments), keep)
    return forward(_problem(arguments), keep)


def routed_experts_backward(gradient: Tensor, needed: list[bool], pre: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """moe_fn::routed_experts_backward_triton; weights are floats."""
    arguments = arguments_of(args)
    of_layer = tuple(needed[:6])  # the others are of adapters, which these kernels refuse
    found = backward(_problem(arguments), gradient, pre, of_layer, transposed=arguments.transposed)
    of, given = dict(zip(DIFFERENTIABLE, found, strict=False)), dict(zip(ARGUMENTS, args, strict=True))
    return tuple(
        gradient.new_empty(0) if (g := of.get(name)) is None or given[name] is None else g.to(given[name].dtype)
        for name in DIFFERENTIABLE
    )


def _shared(arguments: RoutedExpertsArguments) -> dict[str, Any]:
    """What floats and codes have in common."""
    return {
        "x": arguments.x.contiguous(),
        "expert_ids": arguments.expert_ids.contiguous(),
        "expert_weights": arguments.expert_weights.to(torch.float32).contiguous(),
        "gate_up_bias": arguments.gate_up_bias,
        "down_bias": arguments.down_bias,
        "activation": arguments.activation,
        "interleaved": arguments.interleaved,
        "invariant": arguments.invariant,
    }


def _problem(arguments: RoutedExpertsArguments) -> Problem:
    gate_up, down = (t.mT if arguments.transposed else t for t in (arguments.gate_up, arguments.down))
    return Problem(gate_up=gate_up, down=down, **_shared(arguments))


def _quant_problem(arguments: RoutedExpertsArguments) -> layer.QuantProblem:
    quant = quant_of_json(arguments.quant)
    tensors: Any = arguments.quant_weights  # there with codes
    halves = 1 if arguments.interleaved else arguments.activation.gate_up_parts
    return layer.QuantProblem(
        gate_up=matrix_of(quant, with_scales(arguments.gate_up, tensors, "gate_up"), halves),
        down=matrix_of(quant, with_scales(arguments.down, tensors, "down"), 1),
        rounding=quant.activations,
        gate_up_input_scale=tensors.gate_up_input_scale,
        down_input_scale=tensors.down_input_scale,
        **_shared(arguments),
    )
