"""Arguments of ONNX Runtime's op com.microsoft.QMoE, by its schema; its CPU kernel supports integer codes only (1.32),
and ignores quant_type.

    gate_up  [E, 2 I, H * bits / 8] uint8, down [E, H, I * bits / 8] uint8: codes with zero 2^(bits - 1); of two 4-bit
             codes in a byte, the even input is in the low half
    scales   [E, out]; with block_size, the number of inputs that share a scale, [E, out, in / block_size]

With unrounded inputs the results are exact: 5e-7 from the reference in float32. accuracy_level=4 allows int8 inputs,
rounded in groups of block_size. With scales of whole columns inputs are never rounded, with groups of 8-bit codes they
always are.
"""

import torch
from torch import Tensor

from moe_fn.config import MoEConfig, QuantConfig
from moe_fn.quant.codes import codes_of
from moe_fn.records import MoEWeights

_LEAST_BLOCK = 16


def codes_and_scales(quant: QuantConfig, weights: MoEWeights) -> dict[str, Tensor | None]:
    """gate_up, gate_up_scale, down and down_scale."""
    found: dict[str, Tensor | None] = {}
    for name in ("gate_up", "down"):
        stored = codes_of(weights, name)
        found[name] = (stored.codes.to(torch.int16) + 128).to(torch.uint8) if quant.scheme == "int8" else stored.codes
        found[f"{name}_scale"] = stored.scale.squeeze(2) if quant.granularity == "channel" else stored.scale
    return found


def attributes_of_quant(quant: QuantConfig) -> dict[str, object]:
    """The op's attributes in addition to those of MoE."""
    found: dict[str, object] = {
        "expert_weight_bits": quant.row.bits,
        "accuracy_level": 0 if quant.activations is None else 4,
    }
    return found if quant.group_size is None else found | {"block_size": quant.group_size}


def refuses_quant(config: MoEConfig) -> str | None:
    """The reason why the op does not support this quantization, or None."""
    quant = config.quant
    if (
        quant is None
        or quant.scheme not in ("int4", "int8")
        or quant.granularity not in ("channel", "group")
        or quant.zero_points
    ):
        return "its QMoE op takes symmetric int4 and int8 here, a scale for each output or group"
    if quant.activations is not None and quant.activations.scheme != "int8":
        return "its QMoE op rounds inputs to int8 only"
    if quant.activations is not None and quant.granularity == "channel":
        return "its QMoE op does not round inputs where an output has one scale"
    if quant.activations is None and quant.granularity == "group" and quant.scheme == "int8":
        return "its QMoE op rounds the inputs of groups of int8"
    size = quant.group_size
    if size is not None and (
        size < _LEAST_BLOCK or size & (size - 1) or config.hidden_size % size or config.intermediate_size % size
    ):
        return (
            f"its QMoE op needs groups of 16, 32, 64 ... that divide hidden_size and intermediate_size, not of {size}"
        )
    return None
