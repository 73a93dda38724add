"""Helpers of the reference: float64 weights, optional tensors, one-vector products, zeros in autograd's graph."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_fn.records import MoEWeights, leaves_of_weights, weights_of_leaves


def float64_weights(weights: MoEWeights) -> MoEWeights:
    """The weights in float64; integer tensors stay integers."""
    leaves = [t.to(torch.float64) if t is not None and t.is_floating_point() else t for t in leaves_of_weights(weights)]
    return weights_of_leaves(leaves)


def needed(tensor: Tensor | None, name: str) -> Tensor:
    """The tensor; ValueError with its name if it is None."""
    if tensor is None:
        raise ValueError(f"{name} is None; expected a tensor, since the config needs it")
    return tensor


def linear(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """weight [out, in] times the vector x [in], plus bias [out] if given."""
    product = weight @ x
    return product if bias is None else product + bias


def rms_norm(v: Tensor, epsilon: float) -> Tensor:
    """v / sqrt(mean(v^2) + epsilon) of a vector v."""
    return v * torch.rsqrt(v.square().mean() + epsilon)


def is_real(token_mask: Tensor | None, tokens: int) -> list[bool]:
    """Whether each token is real, not padding; all are without a mask."""
    return [True] * tokens if token_mask is None else [bool(real) for real in token_mask.reshape(-1).tolist()]


def stack_rows(rows: Sequence[Tensor], width: int, like: Tensor) -> Tensor:
    """The vectors as [rows, width], also for 0 vectors, where torch.stack raises."""
    return torch.stack(list(rows)) if rows else like.new_zeros(0, width)


def zero_of(*tensors: Tensor | None) -> Tensor:
    """A 0 that depends on every tensor in autograd without reading any value.

    Added to a result, it makes gradients zeros where nothing was computed (no tokens, an expert without slots).
    """
    zero = torch.zeros((), dtype=torch.float64)
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point():
            zero = zero.to(tensor.device) + tensor.reshape(-1)[:0].to(torch.float64).sum()  # the sum of no elements
    return zero
