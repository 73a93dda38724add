"""Elementwise functions and reductions: torch's, and batch-invariant ones.

A row's bits depend on the batch where a library selects code by sizes, or by an element's position in a tensor: matrix
products, row sums, exp and similar functions. Elementwise +, -, *, / and square roots are rounded by IEEE 754, so
functions composed of these alone are batch-invariant. A layer uses `ARITHMETIC[config.batch_invariant]`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.numerics import accumulation_dtype
from moe_fn.ops import elementwise

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Arithmetic:
    """The functions of a layer.

    row_sum: sum over the last dimension, kept with size 1. expand_rows: [..., 1] to [..., n], or left to broadcasting.
    sum_dim: sum over a short dimension.
    """

    sigmoid: Function
    tanh: Function
    softplus: Function
    silu: Function
    gelu: Function
    gelu_tanh: Function
    softmax: Function
    row_sum: Function
    expand_rows: Callable[[Tensor, int], Tensor]
    sum_dim: Callable[[Tensor, int], Tensor]


def _row_sum(x: Tensor) -> Tensor:
    """Sum by halves: a binary tree of additions, whose shape depends only on the length of a row."""
    size, dtype = x.shape[-1], x.dtype
    x = F.pad(x.to(accumulation_dtype(dtype)), (0, (1 << (size - 1).bit_length()) - size))
    while x.shape[-1] > 1:
        left, right = x.chunk(2, -1)
        x = left + right
    return x.to(dtype)


def _expand_rows(x: Tensor, count: int) -> Tensor:
    """Repeats by doubling, so that its gradient is a tree of additions too."""
    while x.shape[-1] < count:
        x = torch.cat([x, x], -1)
    return x.narrow(-1, 0, count)


def _softmax(z: Tensor) -> Tensor:
    wide = z.to(accumulation_dtype(z.dtype))
    e = elementwise.exp(wide - wide.detach().amax(-1, keepdim=True))
    return (e / _expand_rows(_row_sum(e), e.shape[-1])).to(z.dtype)


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + elementwise.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


_PLAIN = Arithmetic(
    sigmoid=torch.sigmoid,
    tanh=torch.tanh,
    softplus=F.softplus,
    silu=F.silu,
    gelu=F.gelu,
    gelu_tanh=functools.partial(F.gelu, approximate="tanh"),
    softmax=functools.partial(torch.softmax, dim=-1),
    row_sum=lambda x: x.sum(-1, keepdim=True),
    expand_rows=lambda x, count: x,  # broadcasting
    sum_dim=lambda x, dim: x.sum(dim),
)
_INVARIANT = Arithmetic(
    sigmoid=elementwise.sigmoid,
    tanh=elementwise.tanh,
    softplus=elementwise.softplus,
    silu=lambda x: x * elementwise.sigmoid(x),
    gelu=lambda x: 0.5 * x * (1 + elementwise.erf(0.7071067811865476 * x)),
    gelu_tanh=_gelu_tanh,
    softmax=_softmax,
    row_sum=_row_sum,
    expand_rows=_expand_rows,
    sum_dim=lambda x, dim: functools.reduce(torch.add, x.unbind(dim)),
)
ARITHMETIC: dict[bool, Arithmetic] = {False: _PLAIN, True: _INVARIANT}


def rms_norm(config: MoEConfig, x: Tensor, scale: Tensor | None, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last dimension, in float32 or wider, rounded once to the dtype of
    x.

    >>> config = MoEConfig(num_experts=1, top_k=1, hidden_size=2, intermediate_size=1)
    >>> rms_norm(config, torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), 0.0)
    tensor([0.8485, 2.2627])
    """
    arithmetic, wide = ARITHMETIC[config.batch_invariant], x.to(accumulation_dtype(x.dtype))
    y = wide * arithmetic.expand_rows(
        torch.rsqrt(arithmetic.row_sum(wide.square()) / x.shape[-1] + epsilon), x.shape[-1]
    )
    return (y if scale is None else y * scale).to(x.dtype)
