"""Quantization of the experts' weights: floats to codes and scales, and back."""

import dataclasses

import torch
from torch import Tensor

from moe_fn.checks import check_kind
from moe_fn.config import ActivationQuantConfig, MoEConfig, QuantConfig
from moe_fn.quant.calibration import Calibration
from moe_fn.quant.codes import NAMES, codes_of, decoded, encoded
from moe_fn.quant.numbers import NUMBERS, one_if_zero
from moe_fn.quant.tiles import halves_of
from moe_fn.records import MoEWeights, QuantWeights
from moe_fn.weights.axes import shape_of
from moe_fn.weights.check import check_layer
from moe_fn.weights.spec import WEIGHTS, own_axis_sizes


def quantize_weights(
    config: MoEConfig, weights: MoEWeights, quant: QuantConfig | None = None, calibration: Calibration | None = None
) -> tuple[MoEConfig, MoEWeights]:
    """Returns (config, weights) with gate_up and down rounded to the nearest codes, and their scales.

        scale = the smallest with all weights of a tile in the codes' range;  q = round(W / scale)

    weights are floats in the layouts of the config; the result's weight_layout is "out_in". quant=None: config.quant.
    Float scales are float32, those of groups have the dtype of the weights. Biases, the router and shared experts do
    not change. int4 without zero points maps the weight of largest magnitude to -8, so a scale may be negative: steps
    are an eighth smaller than with -7..7.

    calibration   statistics of the experts' inputs (`moe_fn.calibrate`): each tile then takes, of FACTORS times the
                  smallest scale, the one with the smallest sum of mean_square * (W - dequantized W)^2, and static
                  scales cover the largest inputs of the calibration

    Raises ValueError if there is no quant, if the weights are codes already, and for static scales without a
    calibration.

    Laws
        Codes are the nearest to the weights.
        Quantizing dequantized weights changes nothing.
        Calibration does not increase the rounding error.
        Quantized layers equal the reference.
        A quantized layer equals the layer of the dequantized weights.
        Gradients pass through the rounding of inputs.

    Source: OCP microscaling formats 1.0 (mxfp4, mxfp8); compressed-tensors (nvfp4, zero points); ggml (int4's scale).

    >>> config = MoEConfig(num_experts=2, top_k=1, hidden_size=4, intermediate_size=4)
    >>> weights = MoEWeights(gate_up=torch.randn(2, 8, 4), down=torch.randn(2, 4, 4))
    >>> small, codes = quantize_weights(config, weights, QuantConfig(scheme="int8", granularity="channel"))
    >>> codes.gate_up.dtype, codes.quant.gate_up_scale.shape
    (torch.int8, torch.Size([2, 8, 1]))
    """
    check_layer("quantize_weights", config, weights)
    quant = config.quant if quant is None else quant
    if quant is None:
        raise ValueError("quantize_weights: config.quant is None; expected one, or a third argument")
    check_kind("quantize_weights", "quant", quant, QuantConfig)
    if calibration is not None:
        check_kind("quantize_weights", "calibration", calibration, Calibration)
    result = dataclasses.replace(config, quant=quant, weight_layout="out_in")
    parts = {name: getattr(weights, name) for name in NAMES}
    for name, weight in parts.items():
        if weight.ndim != 3 or not weight.is_floating_point() or weight.itemsize == 1:
            raise ValueError(
                f"quantize_weights: weights.{name} is {weight.dtype} with {weight.ndim} dims; "
                "expected floats with 3 dims, not prepared"
            )
    if config.weight_layout == "in_out":
        parts = {name: weight.transpose(1, 2) for name, weight in parts.items()}
    _check_sizes("quantize_weights", config, parts, 1)
    if calibration is None and quant.activations is not None and quant.activations.static:
        raise ValueError(
            "quantize_weights: quant.activations.static=True; expected a calibration, for the scales of the inputs"
        )
    mean_squares = {
        name: None if calibration is None else getattr(calibration, f"{name}_mean_square") for name in NAMES
    }
    encoded_parts = {
        name: encoded(quant, weight.detach(), halves_of(config, name), mean_squares[name])
        for name, weight in parts.items()
    }
    scales = {
        f"{name}_{field}": getattr(codes, field)
        for name, codes in encoded_parts.items()
        for field in ("scale", "zero_point", "global_scale")
    }
    if calibration is not None and quant.activations is not None and quant.activations.static:
        scales |= {
            f"{name}_input_scale": static_scale(quant.activations, getattr(calibration, f"{name}_amax"))
            for name in NAMES
        }
    gate_up, down = (encoded_parts[name].codes for name in NAMES)
    return result, dataclasses.replace(weights, gate_up=gate_up, down=down, quant=QuantWeights(**scales))


def dequantize_weights(
    config: MoEConfig, weights: MoEWeights, dtype: torch.dtype = torch.float32
) -> tuple[MoEConfig, MoEWeights]:
    """Returns (config, weights) with dequantized weights and without quant: inputs of products are not rounded either.

        W = (q - zero_point) * scale * global_scale, in float32, rounded once to dtype

    Raises ValueError if config.quant is None.

    >>> from moe_fn import QuantConfig
    >>> config = MoEConfig(num_experts=1, top_k=1, hidden_size=4, intermediate_size=4)
    >>> weights = MoEWeights(gate_up=torch.ones(1, 8, 4), down=torch.ones(1, 4, 4))
    >>> coded = quantize_weights(config, weights, QuantConfig(scheme="int8", granularity="tensor"))
    >>> torch.equal(dequantize_weights(*coded)[1].down, weights.down)
    True
    """
    check_layer("dequantize_weights", config, weights)
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise ValueError(f"dequantize_weights: dtype is {dtype}; expected float64, float32, bfloat16 or float16")
    if config.quant is None:
        raise ValueError("dequantize_weights: config.quant is None; expected a QuantConfig, for codes")
    _check_sizes("dequantize_weights", config, {name: getattr(weights, name) for name in NAMES}, config.quant.per_byte)
    gate_up, down = (decoded(config.quant, codes_of(weights, name), halves_of(config, name), dtype) for name in NAMES)
    return dataclasses.replace(config, quant=None), dataclasses.replace(weights, gate_up=gate_up, down=down, quant=None)


def _check_sizes(where: str, config: MoEConfig, parts: dict[str, Tensor], per_byte: int) -> None:
    """Checks [E, out, in], with `per_byte` inputs in an element."""
    sizes = own_axis_sizes(config)
    for name, part in parts.items():
        experts, outputs, inputs = shape_of(WEIGHTS[(name,)].axes, sizes)
        expected = [experts, outputs, inputs // per_byte]
        if list(part.shape) != expected:
            raise ValueError(f"{where}: weights.{name} is {list(part.shape)} as [E, out, in]; expected {expected}")


def static_scale(activations: ActivationQuantConfig, amax: Tensor) -> Tensor:
    """Returns static scales of inputs: the largest code is amax (nvfp4: together with the largest group scale)."""
    row = activations.row
    largest = NUMBERS[row.element].largest * (NUMBERS[row.scale].largest if row.has_global_scale else 1)
    return one_if_zero(amax / largest).to(torch.float32)
