"""Helpers for GPU libraries that compute y from x, expert ids and routing weights."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from moe_fn.bench.contestants.entry import Layer, Run, activation_name, refuses_weight_on_input
from moe_fn.bench.contestants.routers import refuses_router, routing_of
from moe_fn.bench.problem import Problem, TokenInput

GPU = ("cuda",)
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [T, H], ids [T, k], weights [T, k] float32 -> [T, H]


def layer_of_experts(
    problem: Problem, experts: Experts, ids_dtype: torch.dtype, leaves: tuple[Tensor, ...] = ()
) -> Layer:
    """The layer of a library, with a router before it if that is part of the problem; ids have dtype `ids_dtype`."""

    def whole(token_input: TokenInput) -> Tensor:
        routing = routing_of(problem, token_input)
        return experts(token_input.x, routing.expert_ids.to(ids_dtype), routing.weights)

    def bind(token_input: TokenInput) -> Run:
        if problem.part == "layer":
            return functools.partial(whole, token_input)
        routing = token_input.routing
        return functools.partial(experts, token_input.x, routing.expert_ids.to(ids_dtype), routing.weights)

    return Layer(bind=bind, leaves=leaves)


def refuses_of_library(problem: Problem, activations: tuple[str, ...], biases: bool, gradients: bool) -> str | None:
    """The reason why a library cannot compute a problem (activation, biases, gradients, router), or None."""
    if activation_name(problem.config) not in activations:
        return f"has {' and '.join(activations)}, not {problem.config.activation}"
    if not biases and (problem.weights.gate_up_bias is not None or problem.weights.down_bias is not None):
        return "has no biases"
    if problem.backward and not gradients:
        return "has no gradients"
    if problem.backward and problem.part == "layer":
        return "is timed with gradients only for given ids and weights"
    return refuses_weight_on_input(problem) or refuses_router(problem)
