"""Choices of experts that rounding decides: scores that tie, or nearly tie, after logits or sums were rounded."""

import torch
from torch import Tensor

import moe_fn
from moe_fn.config import MoEConfig
from moe_fn.records import Routing
from moe_fn.testing import MoEProblem

_TRIES = 32  # an exact tie has the same result in all of them with probability 2^-32


def leant(logits: Tensor, expert_ids: Tensor, least: float = 0.0) -> Tensor:
    """Moves logits by a few roundings towards a choice, so that scores that tie up to rounding give this choice.

    Roundings are of the largest logit of a token, or of `least`.

    >>> leant(torch.tensor([[1.0, 1.0]]), torch.tensor([[1]])).argmax(-1)
    tensor([1])
    """
    top_k, roundings = expert_ids.shape[-1], 2 * torch.finfo(logits.dtype).eps
    places = torch.arange(top_k, 0, -1, dtype=logits.dtype).expand(expert_ids.shape)
    steps = torch.zeros_like(logits).scatter(-1, expert_ids.clamp(min=0), torch.where(expert_ids >= 0, places, 0))
    return logits + steps * roundings * logits.abs().amax(-1, keepdim=True).clamp(min=least)


def has_logits_off_the_grid(problem: MoEProblem) -> bool:
    """Whether a gate inside the layer has inputs that were rounded before."""
    config = problem.config
    norms_input, norms_gate = (config.norms is not None and getattr(config.norms, name) for name in ("input", "gate"))
    transformed = config.router.gate_input == "transformed" and (config.latent is not None or norms_input)
    return problem.logits is None and (norms_gate or transformed)


def sums_may_tie(config: MoEConfig) -> bool:
    """Whether groups are chosen by sums of two biased scores, where (a + b) + (c - b) is a + c up to rounding."""
    router = config.router
    return router.groups is not None and router.groups.score == "top2_sum" and router.correction_bias != "none"


def undecided(problem: MoEProblem, logits: Tensor, radius: Tensor) -> Tensor:
    """Returns the tokens whose choice changes when logits move within a radius: logits [..., N], radius [T, N] -> [T].

    Found by trials: a choice has changed if ids differ, or if weights move more than 16 times as far as the logits.
    With a capacity all tokens are undecided if one is.
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
    """Returns ids [T, k] sorted, with their weights."""
    ids, order = routing.expert_ids.flatten(0, -2).sort(-1)
    return ids, routing.weights.flatten(0, -2).to(torch.float64).gather(-1, order)
