"""Error bounds of logits and routing weights, for a given choice of experts."""

import torch
from torch import Tensor

from moe_fn.config import MoEConfig, RouterConfig
from moe_fn.records import RouterWeights
from moe_fn.reference.scores import SCORES
from moe_fn.testing.bounds.ball import (
    Ball,
    Units,
    exact,
    gamma,
    monotone,
    over,
    plus,
    product,
    rounded,
    scaled,
    stored,
    times,
    wide,
)

_OWN_ROUNDINGS = 8  # of a score function, relative to its value; softmax adds those of its sum and of exp's argument


def gate_logits(units: Units, config: MoEConfig, router: RouterWeights, seen: Ball) -> Ball:
    """gate @ seen + bias: [T, num_logits], in float32 or the layer's dtype."""
    if router.gate is None:
        raise ValueError("weights.router.gate is None; expected a gate, since there are no logits")
    own = _units_of(units, config.router.gate_dtype)
    gate = Ball(router.gate, own.stored * router.gate.abs()) if own.stored > own.wide else exact(router.gate)
    z = stored(own, product(own, gate, seen))
    return z if router.bias is None else stored(own, plus(z, Ball(router.bias, own.stored * router.bias.abs())))


def _units_of(units: Units, dtype: str) -> Units:
    return units if dtype == "input" else Units(units.wide, units.wide, 0.0)


def routing_weights(
    units: Units, config: MoEConfig, router: RouterWeights, logits: Ball, ids: Tensor, weights: Tensor
) -> tuple[Ball, Ball | None]:
    """Weights of the chosen experts [T, top_k] and of shared ones: w = score(z)[ids] / norm * expert_scale[ids] *
    gamma.

    ids [T, top_k], -1 for none; weights [T, top_k] of the reference, 0 for choices without effect.
    """
    options = config.router
    own = _units_of(units, options.score_dtype)
    z = _transformed(own, options, logits)
    scores, shared = _scores(own, config, z, ids)
    count = weights != 0
    chosen = Ball(torch.where(count, scores.value, 0), torch.where(count, scores.radius, 0))
    if options.renormalize:
        total = _norm(own, options, chosen if shared is None else _joined(chosen, shared))
        chosen, shared = (
            rounded(over(chosen, total), own.wide),
            None if shared is None else rounded(over(shared, total), own.wide),
        )
    if router.expert_scale is not None:
        scale = router.expert_scale
        chosen = rounded(times(chosen, exact(scale[ids.clamp(min=0)])), own.stored)
        shared = None if shared is None else rounded(times(shared, exact(scale[config.num_choices :])), own.stored)
    if options.scale_on == "weights" and options.routed_scaling_factor != 1.0:
        factor = options.routed_scaling_factor
        chosen, shared = (
            rounded(scaled(chosen, factor), own.wide),
            None if shared is None else rounded(scaled(shared, factor), own.wide),
        )
    return chosen, shared


def _transformed(own: Units, options: RouterConfig, logits: Ball) -> Ball:
    z = rounded(scaled(logits, options.logit_multiplier), own.stored) if options.logit_multiplier != 1.0 else logits
    cap = options.logit_softcap
    return z if cap is None else rounded(monotone(z, lambda t: cap * torch.tanh(t / cap)), gamma(6, own.stored))


def _scores(own: Units, config: MoEConfig, z: Ball, ids: Tensor) -> tuple[Ball, Ball | None]:
    options, choices = config.router, config.num_choices
    shared = None if config.num_logits == choices else _score(own, options.scoring, z.map(lambda t: t[..., choices:]))
    own_z = z.map(lambda t: t[..., :choices])
    places = ids.clamp(min=0)
    if options.selection == "sparsemixer":
        return _sparsemixer(own, options, own_z, places), shared
    if options.scoring_order == "after_top_k":
        taken = own_z.map(lambda t: torch.where(ids >= 0, t.gather(-1, places), -torch.inf))
        return _score(
            own, options.scoring, Ball(taken.value, taken.radius.nan_to_num(posinf=0, neginf=0).abs())
        ), shared
    return _score(own, options.scoring, own_z).map(lambda t: t.gather(-1, places)), shared


def _score(own: Units, scoring: str, z: Ball) -> Ball:
    if scoring == "softmax":
        return _softmax(own, z)
    if scoring == "identity":
        return Ball(z.value.nan_to_num(neginf=0.0), z.radius)
    return rounded(monotone(z, SCORES[scoring]), gamma(_OWN_ROUNDINGS, own.stored))


def _softmax(own: Units, z: Ball) -> Ball:
    """exp(z - max) / sum: an error r of the arguments changes the result by a factor of at most exp(2 r)."""
    value = torch.softmax(z.value, -1)
    radius, size = (
        z.radius.amax(-1, keepdim=True),
        (z.value - z.value.amax(-1, keepdim=True)).abs().nan_to_num(posinf=0.0),
    )
    roundings = _OWN_ROUNDINGS + z.value.shape[-1] + size + size.nan_to_num(posinf=0.0).amax(-1, keepdim=True)
    return Ball(value, value * (torch.expm1(2 * radius) + 1.01 * roundings * own.stored))


def _sparsemixer(own: Units, options: RouterConfig, z: Ball, ids: Tensor) -> Ball:
    """Two softmaxes over the logits near the first and the second choice."""
    first = ids[:, :1]
    without = z.value.scatter(-1, first, -torch.inf) if len(ids) else z.value
    found = []
    for place, candidates in ((ids[:, :1], z.value), (ids[:, 1:], without)):
        top = z.value.gather(-1, place)
        far = (top - z.value) / torch.maximum(z.value.abs(), top) > 2 * options.sparsemixer_epsilon
        found.append(
            _softmax(own, Ball(torch.where(far, -torch.inf, candidates), z.radius)).map(
                lambda t, at=place: t.gather(-1, at)  # type: ignore[misc]
            )
        )
    return _joined(*found)


def _joined(a: Ball, b: Ball) -> Ball:
    return Ball(torch.cat([a.value, b.value], -1), torch.cat([a.radius, b.radius], -1))


def _norm(own: Units, options: RouterConfig, chosen: Ball) -> Ball:
    """D = max(norm of the scores + epsilon, minimum), or 1: a norm changes by at most the sum of the changes."""
    order, terms = options.renormalize_order, chosen.value.shape[-1]
    value = torch.linalg.vector_norm(chosen.value, order, -1, keepdim=True)
    total = rounded(
        Ball(value, chosen.radius.sum(-1, keepdim=True)), gamma(terms + (0 if order == 1.0 else 8), own.wide)
    )
    if options.renormalize_epsilon:
        total = wide(own, Ball(total.value + options.renormalize_epsilon, total.radius))
    total = Ball(total.value.clamp(min=options.renormalize_minimum), total.radius)
    return Ball(torch.where(total.value > 0, total.value, 1), total.radius)
