"""Router in plain torch for libraries that only compute experts."""

import dataclasses

import torch
from torch import Tensor

from moe_fn.bench.problem import Problem, TokenInput
from moe_fn.config import RouterConfig
from moe_fn.records import RouterWeights, Routing

_SOFTMAX = RouterConfig()


def refuses_router(problem: Problem) -> str | None:
    """The reason if the router is part of the problem and is not softmax and top-k; else None."""
    if problem.part == "experts" or is_softmax(problem.config.router):
        return None
    return "its router here is softmax and top-k only"


def is_softmax(router: RouterConfig) -> bool:
    """Whether the router is softmax and top-k in either order, renormalized or not."""
    return dataclasses.replace(router, renormalize=True, scoring_order="before_top_k", gate_dtype="float32") == _SOFTMAX


def renormalizes(router: RouterConfig) -> bool:
    """Whether the chosen weights sum to one, as they also do with a softmax over the chosen logits."""
    return router.renormalize or router.scoring_order == "after_top_k"


def route_by_softmax(problem: Problem, x: Tensor) -> Routing:
    """The routing of x [T, H] by softmax and top-k."""
    router = problem.weights.router or RouterWeights()
    if router.gate is None:
        raise ValueError("problem.weights.router.gate is None; expected the gate of the layer")
    logits = torch.nn.functional.linear(x, router.gate, router.bias)
    weights, ids = torch.softmax(logits.float(), dim=-1).topk(problem.config.top_k, dim=-1)
    if renormalizes(problem.config.router):
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(expert_ids=ids, weights=weights)


def routing_of(problem: Problem, token_input: TokenInput) -> Routing:
    """The given routing, or with part "layer" the router's."""
    return route_by_softmax(problem, token_input.x) if problem.part == "layer" else token_input.routing
