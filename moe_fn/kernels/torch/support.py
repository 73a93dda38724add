"""Which layers torch's own products compute: every option but a number format that has no row in their table."""

import functools

import torch

from moe_fn.config.quant import quant_of_json
from moe_fn.quant.numbers import NUMBERS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROW_BY_ROW = ("cpu", "meta")  # devices on which a row can be multiplied by itself


def problem(device: str, dtype: torch.dtype, invariant: bool = False) -> str | None:
    """Why torch's products do not run for this device and dtype; None if they do."""
    if dtype not in DTYPES:
        return f"torch's products compute in float64, float32, bfloat16 and float16, not in {dtype}"
    if invariant and device not in ROW_BY_ROW:
        return f"torch's products on {device} choose their kernels by the batch; expected batch_invariant=False"
    return None


def experts_problem(config: str) -> str | None:
    """Why no op computes dispatch, experts and combine at once."""
    return "back-end 'torch'"


@functools.lru_cache
def quant_problem(quant: str) -> str | None:
    """Why the products do not decode weights (`QuantConfig.json`); None if they do."""
    element = quant_of_json(quant).row.element
    return None if element in NUMBERS else f"quant: codes of {element}; torch's products take {', '.join(NUMBERS)}"
