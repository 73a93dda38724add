"""Reference activations of one vector, as defined by `moe_fn.config.ActivationConfig`."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from moe_fn.config import ActivationConfig


def activate(activation: ActivationConfig, h: Tensor, layout: Literal["packed", "interleaved"] = "packed") -> Tensor:
    """The activation of the gate-and-up product h.

        gated:      f(min(g, limit)) * (clamp(u, -limit, limit) + up_offset), or with min(f(g), limit) as first factor
        not gated:  f(h)

    h [2 I] float64 (g and u: halves, or even and odd entries) -> [I]; not gated: h [I] -> [I].

    >>> activate(ActivationConfig(function="relu"), torch.tensor([2.0, -1.0, 10.0, -10.0]))
    tensor([20., -0.])
    """
    if not activation.gated:
        return gate_function(activation, h)
    gate, up = (h[0::2], h[1::2]) if layout == "interleaved" else (h[: len(h) // 2], h[len(h) // 2 :])
    return gate_factor(activation, gate) * up_factor(activation, up)


def gate_factor(activation: ActivationConfig, gate: Tensor) -> Tensor:
    """f(g), limited from above, before or after f."""
    if activation.limit is None:
        return gate_function(activation, gate)
    if activation.limit_at == "input":
        return gate_function(activation, gate.clamp(max=activation.limit))
    return gate_function(activation, gate).clamp(max=activation.limit)


def up_factor(activation: ActivationConfig, up: Tensor) -> Tensor:
    """u, limited on both sides, softly capped and shifted."""
    if activation.limit is not None:
        up = up.clamp(-activation.limit, activation.limit)
    if activation.up_cap is not None:
        up = activation.up_cap * torch.tanh(up / activation.up_cap)
    return up + activation.up_offset


def gate_function(activation: ActivationConfig, g: Tensor) -> Tensor:
    """The elementwise function f."""
    if activation.function not in GATE_FUNCTIONS:
        raise ValueError(f"ActivationConfig.function={activation.function!r}: the reference does not implement it")
    return GATE_FUNCTIONS[activation.function](activation, g)


GATE_FUNCTIONS: dict[str, Callable[[ActivationConfig, Tensor], Tensor]] = {
    "silu": lambda a, g: g * torch.sigmoid(a.alpha * g),
    "gelu": lambda a, g: 0.5 * g * (1.0 + torch.erf(g / math.sqrt(2.0))),
    "gelu_tanh": lambda a, g: 0.5 * g * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (g + 0.044715 * g**3))),
    "relu": lambda a, g: torch.relu(g),
    "relu2": lambda a, g: torch.relu(g) ** 2,
    "situ": lambda a, g: a.gate_cap * torch.tanh(g / a.gate_cap) * torch.sigmoid(g),  # type: ignore[operator]
}
