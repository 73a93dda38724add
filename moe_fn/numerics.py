"""Which dtype sums are carried in, and the norm that several stages share."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or wider if the input is.

    >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, scale: Tensor | None, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last dimension, in float32 or wider, rounded once to the dtype of x.

    >>> rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), 0.0)
    tensor([0.8485, 2.2627])
    """
    wide = x.to(accumulation_dtype(x.dtype))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (y if scale is None else y * scale).to(x.dtype)
