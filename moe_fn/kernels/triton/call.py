"""The Triton kernels behind a door that opens when one is needed: Triton is not imported before."""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from moe_fn.config.quant import quant_of_json
from moe_fn.torch_compat import constant_while_tracing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(device: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels do not run for this device and dtype; None if they do."""
    if device not in ("cuda", "cpu"):
        return f"the Triton kernels run on CUDA and ROCm devices, not on {device}"
    if dtype not in DTYPES:
        return f"the Triton kernels compute in float32, bfloat16 and float16, not in {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device == "cpu" and not interpreted():
        return (
            "the Triton kernels run on the CPU only under Triton's interpreter (start Python with TRITON_INTERPRET=1), "
            "for tests"
        )
    return None


@constant_while_tracing
def quant_problem(quant: str, hidden: int, intermediate: int, device: str) -> str | None:
    """Why the Triton kernels do not compute quantized experts (`QuantConfig.text`) on a device that runs them; None if
    they do.
    """
    arch = importlib.import_module("moe_fn.kernels.triton.tiles").architecture_of(torch.device(device))
    found: str | None = _coverage().problem(quant_of_json(quant), (hidden, intermediate), arch)
    return found


def decodes(quant: str, inputs: int) -> bool:
    """Whether a product of the Triton kernels decodes weights with so many inputs."""
    return _coverage().problem_of_weights(quant_of_json(quant), (inputs,)) is None


def _coverage() -> Any:
    return importlib.import_module("moe_fn.kernels.triton.quant.support")


def interpreted() -> bool:
    """Whether kernels made from now on are Triton's interpreter's."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def run(name: str, like: Tensor, *rest: Any) -> Any:
    """The function `name` of moe_fn.kernels.triton.entry on (like, *rest)."""
    wrong = problem(like.device.type, like.dtype)
    if wrong is not None:
        raise RuntimeError(f"moe_fn::{name}_triton: {wrong}")
    function = getattr(importlib.import_module("moe_fn.kernels.triton.entry"), name)
    with torch.cuda.device_of(like):  # Triton launches on the current device
        return function(like, *rest)
