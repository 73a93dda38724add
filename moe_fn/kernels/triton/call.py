"""Lazy entry to the Triton kernels: moe_fn's ops import Triton on the first call."""

import importlib
from typing import Any

import torch
from torch import Tensor

from moe_fn.kernels.triton.support import problem


def run(name: str, like: Tensor, *rest: Any) -> Any:
    """Calls the function `name` of moe_fn.kernels.triton.entry with (like, *rest)."""
    wrong = problem(like.device.type, like.dtype)
    if wrong is not None:
        raise RuntimeError(f"moe_fn::{name}_triton: {wrong}")
    function = getattr(importlib.import_module("moe_fn.kernels.triton.entry"), name)
    with torch.cuda.device_of(like):  # Triton launches on the current device
        return function(like, *rest)
