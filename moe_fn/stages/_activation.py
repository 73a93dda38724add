"""The activation between an expert's two products: a table of gate functions."""

import math
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from moe_fn.config import ActivationConfig
from moe_fn.ops.arithmetic import ARITHMETIC, Arithmetic

# f(g): a new gate function is one row. All of them map 0 to 0, so that rows of no expert stay zero.
GATE_FUNCTIONS: dict[str, Callable[[Arithmetic, ActivationConfig, Tensor], Tensor]] = {
    "silu": lambda m, c, g: g * m.sigmoid(c.alpha * g) if c.alpha != 1.0 else m.silu(g),
    "gelu": lambda m, c, g: m.gelu(g),
    "gelu_tanh": lambda m, c, g: m.gelu_tanh(g),
    "relu": lambda m, c, g: F.relu(g),
    "relu2": lambda m, c, g: F.relu(g).square(),
    "situ": lambda m, c, g: _soft_cap(m, g, c.gate_cap or math.inf) * m.sigmoid(g),
}


def activate(
    activation: ActivationConfig, h: Tensor, layout: str = "packed", arithmetic: Arithmetic = ARITHMETIC[False]
) -> Tensor:
    """Applies the activation to pre-activations: `h [..., 2I] -> [..., I]` if gated, else `[..., I] -> [..., I]`.

    Computes in the dtype of `h`; callers pass float32 (or wider) and round once afterwards.
    Source: the models named in `ActivationConfig`; silu gating is Shazeer 2020, arXiv 2002.05202.

    >>> import torch
    >>> from moe_fn.config import as_activation
    >>> activate(as_activation("silu"), torch.tensor([2.0, -1.0, -3.0, 0.5]))
    tensor([-5.2848, -0.1345])
    """
    f = partial(GATE_FUNCTIONS[activation.function], arithmetic, activation)
    if not activation.gated:
        return f(h)
    gate, up = h.chunk(2, -1) if layout == "packed" else h.unflatten(-1, (-1, 2)).unbind(-1)
    limit = activation.limit
    if limit is None:
        gate = f(gate)
    elif activation.limit_at == "input":
        gate, up = f(gate.clamp(max=limit)), up.clamp(-limit, limit)
    else:
        gate, up = f(gate).clamp(max=limit), up.clamp(-limit, limit)
    if activation.up_cap is not None:
        up = _soft_cap(arithmetic, up, activation.up_cap)
    return gate * (up + activation.up_offset if activation.up_offset else up)


def _soft_cap(arithmetic: Arithmetic, x: Tensor, cap: float) -> Tensor:
    return cap * arithmetic.tanh(x / cap)
