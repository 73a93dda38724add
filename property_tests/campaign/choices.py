"""Choices of experts that rounding makes: scores that tie, or nearly so, once logits or sums of scores have been
rounded.
"""

import torch
from torch import Tensor

import moe_fn
from moe_fn.config import MoEConfig
from moe_fn.records import Routing
from moe_fn.testing import MoEProblem

_TRIES = 32  # an exact tie goes the same way in all of them once in 2^32


def leant(logits: Tensor, expert_ids: Tensor, least: float = 0.0) -> Tensor:
    """Logits a few roundings away, towards a choice: scores that tie but for rounding are then apart as the choice has
    it.

    Roundings of the largest logit of a token, or of `least`.

    >>> leant(torch.tensor([[1.0, 1.0]]), torch.tensor([[1]])).argmax(-1)
    tensor([1])
    """
    top_k, roundings = expert_ids.shape[-1], 2 * torch.finfo(logits.dtype).eps
    places = torch.arange(top_k, 0, -1, dtype=logits.dtype).expand(expert_ids.shape)
    steps = torch.zeros_like(logits).scatter(-1, expert_ids.clamp(min=0), torch.where(expert_ids >= 0, places, 0))
    return logits + steps * roundings * logits.abs().amax(-1, keepdim=True).clamp(min=least)


def has_logits_off_the_grid(problem: MoEProblem) -> bool:
    """Whether a gate inside the layer sees what was rounded before."""
    config = problem.config
    norms_input, norms_gate = (config.norms is not None and getattr(config.norms, name) for name in ("input", "gate"))
    transformed = config.router.gate_input == "transformed" and (config.latent is not None or norms_input)
    return problem.logits is None and (norms_gate or transformed)


def sums_may_tie(config: MoEConfig) -> bool:
    """Whether groups are chosen by sums of two biased scores, where (a + b) + (c - b) is a + c but for rounding."""
    router = config.router
    return router.groups is not None and router.groups.score == "top2_sum" and router.correction_bias != "none"


def undecided(problem: MoEProblem, logits: Tensor, radius: Tensor) -> Tensor:
    """Tokens whose experts, or whether one counts at all, change where logits move within a radius: logits [..., N],
    radius [T, N] -> [T].

    By trying; weights that move more than 16 times as far as the logits did have jumped. Places that a capacity gives
    away are all undecided where one is.
    """
    generator = torch.Generator().manual_seed(0)
    ids, weights = _sorted(_routed(problem, logits))
    found = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(_TRIES):
        noise = (2 * torch.rand(radius.shape, generator=generator, dtype=torch.float64) - 1) * radius
        other_ids, other_weights = _sorted(_routed(problem, (logits + noise.reshape(logits.shape)).to(logits.dtype)))
        moved = (other_weights - weights).abs().amax(-1, keepdim=True) > 16 * radius.amax(-1, keepdim=True)
        found |= ((other_ids != ids) | moved).any(-1)
    return found if problem.config.router.capacity is None else found.any().expand(found.shape)


def _routed(problem: MoEProblem, logits: Tensor) -> Routing:
    routing: Routing = problem.replace(logits=logits).call(moe_fn.moe_route)[1]
    return routing


def _sorted(routing: Routing) -> tuple[Tensor, Tensor]:
    """Ids [T, k] in their own order, with their weights."""
    ids, order = routing.expert_ids.flatten(0, -2).sort(-1)
    return ids, routing.weights.flatten(0, -2).to(torch.float64).gather(-1, order)
