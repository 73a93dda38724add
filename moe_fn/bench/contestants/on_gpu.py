"""What the libraries for GPUs have in common: they take x, ids and weights of the experts, and compute y."""

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
    """The layer, with the router in front of it if that is part of the problem; the ids come in the dtype that the
    library wants.
    """

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
    """What a library cannot do: other activations, biases, gradients, another router than softmax in front of it."""
    if activation_name(problem.config) not in activations:
        return f"has {' and '.join(activations)}, not {problem.config.activation}"
    if not biases and (problem.weights.gate_up_bias is not None or problem.weights.down_bias is not None):
        return "has no biases"
    if problem.backward and not gradients:
        return "has no gradients"
    if problem.backward and problem.part == "layer":
        return "is timed here with given ids and weights only, where gradients are"
    return refuses_weight_on_input(problem) or refuses_router(problem)
