"""What stands between an expert's two products: a table of functions."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fn.config import ActivationConfig

# f(g): a new gate function is one line. All of them map 0 to 0, so rows of no expert stay zero.
GATE_FUNCTIONS: dict[str, Callable[[ActivationConfig, Tensor], Tensor]] = {
    "silu": lambda c, g: g * torch.sigmoid(c.alpha * g) if c.alpha != 1.0 else F.silu(g),
    "gelu": lambda c, g: F.gelu(g),
    "gelu_tanh": lambda c, g: F.gelu(g, approximate="tanh"),
    "relu": lambda c, g: F.relu(g),
    "relu2": lambda c, g: F.relu(g).square(),
    "situ": lambda c, g: _soft_cap(g, c.gate_cap or math.inf) * torch.sigmoid(g),
}


def activate(activation: ActivationConfig, h: Tensor, layout: str = "packed") -> Tensor:
    """Apply the activation to the first product, `h [..., 2I] -> [..., I]` gated or `[..., I] -> [..., I]` plain.

    Computes in the dtype of `h`; callers pass float32 (or wider) and round once afterwards.
    Source: the models named in `ActivationConfig`; silu gating is Shazeer 2020, arXiv 2002.05202.

    >>> from moe_fn.config import as_activation
    >>> activate(as_activation("silu"), torch.tensor([2.0, -1.0, -3.0, 0.5]))
    tensor([-5.2848, -0.1345])
    """
    f = GATE_FUNCTIONS[activation.function]
    if not activation.gated:
        return f(activation, h)
    gate, up = h.chunk(2, -1) if layout == "packed" else h.unflatten(-1, (-1, 2)).unbind(-1)
    limit = activation.limit
    if limit is None:
        gate = f(activation, gate)
    elif activation.limit_at == "input":
        gate, up = f(activation, gate.clamp(max=limit)), up.clamp(-limit, limit)
    else:
        gate, up = f(activation, gate).clamp(max=limit), up.clamp(-limit, limit)
    if activation.up_cap is not None:
        up = _soft_cap(up, activation.up_cap)
    return gate * (up + activation.up_offset if activation.up_offset else up)


def _soft_cap(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)
