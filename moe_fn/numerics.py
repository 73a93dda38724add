"""Accumulation dtypes, and a square root whose gradient at 0 is 0."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that sums accumulate in: float32, or a wider input dtype.

    >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def root(x: Tensor) -> Tensor:
    """Square root of x, with gradient 0 at x = 0, where the true derivative is infinite and inf * 0 would be NaN.

    >>> root(torch.tensor([0.0, 4.0]))
    tensor([0., 2.])
    """
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)
