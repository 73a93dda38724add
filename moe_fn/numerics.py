"""Which dtype sums are carried in."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or wider if the input is.

    >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)
