"""Named quantizations of experts for the benchmark, and the bytes of a quantized expert."""

import dataclasses
import math

import torch

from moe_fn.config import ActivationQuantConfig, MoEConfig, QuantConfig
from moe_fn.weights.shapes import expected_weights

_INT8 = ActivationQuantConfig(scheme="int8", granularity="token")
_FP8 = ActivationQuantConfig(scheme="fp8_e4m3", granularity="token")
_FP8_OF_128 = ActivationQuantConfig(scheme="fp8_e4m3", granularity="group", group_size=128)
_BLOCK = (128, 128)  # DeepSeek's

# The last part of a name is the scheme of rounded inputs; without one they are not rounded.
QUANTS: dict[str, QuantConfig | None] = {
    "none": None,
    "int8": QuantConfig(scheme="int8", granularity="channel"),
    "int8-int8": QuantConfig(scheme="int8", granularity="channel", activations=_INT8),
    "int4-g32": QuantConfig(scheme="int4", granularity="group", group_size=32),
    "int4-g128": QuantConfig(scheme="int4", granularity="group", group_size=128),
    "int4-g32-int8": QuantConfig(scheme="int4", granularity="group", group_size=32, activations=_INT8),
    "mxfp4": QuantConfig(scheme="mxfp4", granularity="group", group_size=32),
    "nvfp4": QuantConfig(scheme="nvfp4", granularity="group", group_size=16),
    "fp8": QuantConfig(scheme="fp8_e4m3", granularity="channel"),
    "fp8-fp8": QuantConfig(scheme="fp8_e4m3", granularity="channel", activations=_FP8),
    "fp8-block": QuantConfig(scheme="fp8_e4m3", granularity="block", block_shape=_BLOCK),
    "fp8-block-fp8": QuantConfig(scheme="fp8_e4m3", granularity="block", block_shape=_BLOCK, activations=_FP8_OF_128),
}


def check_quant(name: str) -> str:
    """The name; ValueError if QUANTS does not have it."""
    if name not in QUANTS:
        raise ValueError(f"expected some of {', '.join(QUANTS)}, separated by commas")
    return name


def quantized_config(config: MoEConfig, quant: QuantConfig | None) -> MoEConfig:
    """The config with quantized experts; codes have the layout [E, out, in]."""
    return config if quant is None else dataclasses.replace(config, quant=quant, weight_layout="out_in")


def expert_bytes(config: MoEConfig, dtype: torch.dtype) -> int:
    """Bytes of one expert's matrices: floats of that dtype, or codes with scales and zero points.

    >>> config = MoEConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=32)
    >>> expert_bytes(config, torch.bfloat16) == 3 * 64 * 32 * 2
    True
    >>> expert_bytes(quantized_config(config, QUANTS["mxfp4"]), torch.bfloat16) == 3 * (64 * 32 // 2 + 64 * 32 // 32)
    True
    """
    read = [expected for expected in expected_weights(config) if expected.path[0] in ("gate_up", "down", "quant")]
    return sum(math.prod(e.sizes[1:]) * _itemsize(config.quant, e.path[-1], dtype) for e in read if e.sizes is not None)


def _itemsize(quant: QuantConfig | None, name: str, dtype: torch.dtype) -> int:
    """Bytes of an element as stored by quantize_weights for floats of that dtype."""
    if quant is None:
        return dtype.itemsize
    if name.endswith(("global_scale", "input_scale")):
        return 4
    if name.endswith("scale") and quant.row.scale == "float":
        return dtype.itemsize if quant.granularity == "group" else 4
    return 1
