"""Error bounds of the activation between an expert's products."""

import dataclasses

import torch
from torch import Tensor

from moe_fn.config import ActivationConfig
from moe_fn.reference.activation import gate_function, up_factor
from moe_fn.testing.bounds.ball import Ball, Units, monotone, plus, rounded, times, wide

# Error of a gate function f itself, in roundings of |g|: |f(g)| <= |g|, and gelu's 1 + erf cancels to about that.
_OWN_ROUNDINGS = 10
_KINKS = ("relu",)  # functions whose derivative jumps at 0


def activated(units: Units, activation: ActivationConfig, h: Ball, layout: str) -> tuple[Ball, Tensor]:
    """The activation of h [..., gate_up], not yet stored, and whether its derivative may jump within the ball: bool
    [..., I].

    The values of f at the ends of the interval bound it, except at turning points, which are bounded by the second
    derivative, at most alpha.
    """
    if not activation.gated:
        return _gate(units, activation, h), _near(h, 0.0) if activation.function in _KINKS else torch.zeros_like(
            h.value, dtype=torch.bool
        )
    gate, up = _halves(h, layout)
    left, right = _gate(units, activation, gate), _up(units, activation, up)
    return wide(units, times(left, right)), _jumps(activation, gate, up)


def _halves(h: Ball, layout: str) -> tuple[Ball, Ball]:
    if layout == "interleaved":
        return h.map(lambda t: t[..., 0::2]), h.map(lambda t: t[..., 1::2])
    half = h.value.shape[-1] // 2
    return h.map(lambda t: t[..., :half]), h.map(lambda t: t[..., half:])


def _gate(units: Units, activation: ActivationConfig, g: Ball) -> Ball:
    seen = (
        g
        if activation.limit is None or activation.limit_at == "output"
        else monotone(g, lambda t: t.clamp(max=activation.limit))
    )
    curvature = 0.0 if activation.function.startswith("relu") else max(abs(activation.alpha), 1.0)
    value = monotone(seen, lambda t: gate_function(activation, t), curvature)
    size = seen.value.abs() + seen.radius
    size = size.square() if activation.function == "relu2" else size
    value = Ball(value.value, value.radius + _OWN_ROUNDINGS * units.wide * size)
    if activation.limit is not None and activation.limit_at == "output":
        return monotone(value, lambda t: t.clamp(max=activation.limit))
    return value


def _up(units: Units, activation: ActivationConfig, u: Ball) -> Ball:
    without = dataclasses.replace(activation, up_offset=0.0)
    value = monotone(u, lambda t: up_factor(without, t))
    value = value if activation.up_cap is None else wide(units, value, 4)
    if activation.up_offset == 0.0:
        return value
    offset = torch.full_like(value.value, activation.up_offset)
    return wide(units, plus(value, Ball(offset, torch.zeros_like(offset))))


def _near(a: Ball, place: float) -> Tensor:
    return (a.value - place).abs() <= a.radius


def _jumps(activation: ActivationConfig, gate: Ball, up: Ball) -> Tensor:
    jumps = _near(gate, 0.0) if activation.function in _KINKS else torch.zeros_like(gate.value, dtype=torch.bool)
    if activation.limit is None:
        return jumps
    at = (
        gate
        if activation.limit_at == "input"
        else rounded(monotone(gate, lambda t: gate_function(activation, t), 1.0), 2.0**-20)
    )
    return jumps | _near(at, activation.limit) | _near(up, activation.limit) | _near(up, -activation.limit)
