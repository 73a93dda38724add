"""quantize_weights and dequantize_weights: floats to codes and scales, and back."""

import dataclasses

import torch
from torch import Tensor

from moe_fn.config import ActivationQuantConfig, MoEConfig, QuantConfig
from moe_fn.kinds import check_kind, check_layer
from moe_fn.numerics import accumulation_dtype
from moe_fn.quant import numbers
from moe_fn.quant.calibration import Calibration
from moe_fn.quant.numbers import ELEMENTS, NUMBERS, decode_e8m0, encode_e8m0, log2_ceil, log2_floor, one_if_zero, pack_halves, unpack_halves
from moe_fn.quant.shapes import check_sizes
from moe_fn.quant.tiles import WHOLE, Tile, by_tile, halves_of, spread
from moe_fn.records import MoEWeights, QuantWeights

NAMES = ("gate_up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codes:
    """One of gate_up and down as it is stored."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None


def quantize_weights(
    config: MoEConfig, weights: MoEWeights, quant: QuantConfig | None = None, calibration: Calibration | None = None
) -> tuple[MoEConfig, MoEWeights]:
    """(config, weights) with gate_up and down as codes and scales, each rounded to the nearest code.

        scale = the least that leaves no weight of a tile out of the codes' range;  q = round(W / scale)

    weights are floats in any layout that the config has; the result's weight_layout is "out_in". quant None: config.quant. Scales that
    are floats are float32, those of groups in the dtype of the weights. Biases, the router and shared experts stay as they are.
    int4 without zero points maps the weight of largest magnitude to -8, so a scale may be negative: steps are an eighth smaller than with
    -7..7.

    calibration   what the experts see of some tokens (`moe_fn.calibrate`): of FACTORS times the least scale each tile then takes the one
                  with the least sum of mean_square * (W - what the code stands for)^2, and static scales of inputs cover what was seen

    Raises ValueError where there is no quant, the weights are codes already, or scales are static and nothing is known of the inputs.

    Laws
        Codes are the nearest ones.
        Quantising what was dequantised changes nothing.
        Calibrated rounding errs no more.
        Quantised layers equal the reference.
        Quantised layers equal those of the floats that codes stand for.
        Gradients pass the rounding of inputs.

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
        raise ValueError("quantize_weights: config.quant is None; expected one there, or as the third argument")
    check_kind("quantize_weights", "quant", quant, QuantConfig)
    if calibration is not None:
        check_kind("quantize_weights", "calibration", calibration, Calibration)
    result = dataclasses.replace(config, quant=quant, weight_layout="out_in")
    parts = {name: getattr(weights, name) for name in NAMES}
    for name, weight in parts.items():
        if weight.ndim != 3 or not weight.is_floating_point() or weight.itemsize == 1:
            raise ValueError(f"quantize_weights: weights.{name} is {weight.dtype} with {weight.ndim} dims; expected plain floats with 3")
    if config.weight_layout == "in_out":
        parts = {name: weight.transpose(1, 2) for name, weight in parts.items()}
    check_sizes("quantize_weights", config, parts, 1)
    if calibration is None and quant.activations is not None and quant.activations.static:
        raise ValueError("quantize_weights: quant.activations.static=True; expected a calibration, which says what inputs there are")
    seen = {name: None if calibration is None else getattr(calibration, f"{name}_mean_square") for name in NAMES}
    made = {name: encoded(quant, weight.detach(), halves_of(config, name), seen[name]) for name, weight in parts.items()}
    beside = {f"{name}_{field}": getattr(codes, field) for name, codes in made.items() for field in ("scale", "zero_point", "global_scale")}
    if calibration is not None and quant.activations is not None and quant.activations.static:
        beside |= {f"{name}_input_scale": static_scale(quant.activations, getattr(calibration, f"{name}_amax")) for name in NAMES}
    return result, dataclasses.replace(weights, gate_up=made["gate_up"].codes, down=made["down"].codes, quant=QuantWeights(**beside))


def dequantize_weights(config: MoEConfig, weights: MoEWeights, dtype: torch.dtype = torch.float32) -> tuple[MoEConfig, MoEWeights]:
    """(config, weights) with the floats that the codes stand for, and no quant; inputs of products are then no longer rounded either.

        W = (q - zero_point) * scale * global_scale, in float32, rounded once to dtype

    Raises ValueError where config.quant is None.

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
        raise ValueError("dequantize_weights: config.quant is None; expected one, for weights that are codes")
    check_sizes("dequantize_weights", config, {name: getattr(weights, name) for name in NAMES}, config.quant.per_byte)
    gate_up, down = (decoded(config.quant, codes_of(weights, name), halves_of(config, name), dtype) for name in NAMES)
    return dataclasses.replace(config, quant=None), dataclasses.replace(weights, gate_up=gate_up, down=down, quant=None)


def codes_of(weights: MoEWeights, name: str) -> Codes:
    """What of the weights makes up gate_up, or down."""
    quant = weights.quant
    scale = None if quant is None else getattr(quant, f"{name}_scale")
    if quant is None or scale is None:
        raise ValueError(f"weights.quant.{name}_scale is None; expected a tensor, for config.quant asks for it")
    return Codes(
        codes=getattr(weights, name),
        scale=scale,
        zero_point=getattr(quant, f"{name}_zero_point"),
        global_scale=getattr(quant, f"{name}_global_scale"),
    )


def decoded(quant: QuantConfig, stored: Codes, halves: int, dtype: torch.dtype) -> Tensor:
    """The floats: [E, outputs, inputs] in dtype, computed in float32 or wider."""
    wide, row = accumulation_dtype(dtype), quant.row
    codes = _apart(quant, stored.codes)
    size = codes.shape[1], codes.shape[2]

    def at_all_places(values: Tensor, tile: Tile) -> Tensor:
        return spread(values, tile, halves, *size)

    if stored.zero_point is None:
        values = NUMBERS[row.element].decode(codes, wide)
    else:
        values = codes.to(wide) - at_all_places(stored.zero_point.to(wide), quant.tile)
    values = values * at_all_places(decode_scale(quant, stored.scale, wide), quant.tile)
    if stored.global_scale is not None:
        values = values * at_all_places(stored.global_scale.to(wide), WHOLE)
    return values.to(dtype)


def decode_scale(quant: QuantConfig, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as floats, whatever they are stored as."""
    return decode_e8m0(scale, dtype) if quant.row.scale == "e8m0" else scale.to(dtype)


# Of the least scale that leaves no weight of a tile out of range, those that are tried: few large weights may be cut for many small ones.
FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def encoded(quant: QuantConfig, weight: Tensor, halves: int, importance: Tensor | None = None) -> Codes:
    """The codes nearest to [E, outputs, inputs] floats, and their scales; with the importance of inputs [E, inputs] the best of FACTORS."""
    if importance is None:
        return _encoded(quant, weight, halves, 1.0)
    found = [_encoded(quant, weight, halves, factor) for factor in FACTORS]
    errors = []
    for codes in found:
        difference = decoded(quant, codes, halves, torch.float32) - weight.to(torch.float32)
        errors.append(by_tile(difference.square() * importance.unsqueeze(1), quant.tile, halves).sum(-1))
    best = torch.stack(errors).argmin(0)  # of each tile
    of_weight = spread(best, quant.tile, halves, weight.shape[1], weight.shape[2])
    zero_points = [codes.zero_point for codes in found if codes.zero_point is not None]
    # One by one: the two codes of a byte may lie in two tiles.
    chosen = _chosen([_apart(quant, codes.codes) for codes in found], of_weight)
    return Codes(
        codes=pack_halves(chosen) if quant.row.bits == 4 else chosen,
        scale=_chosen([codes.scale for codes in found], best),
        zero_point=_chosen(zero_points, best) if zero_points else None,
        global_scale=found[0].global_scale,
    )


def _apart(quant: QuantConfig, codes: Tensor) -> Tensor:
    """Each code an element of its own."""
    return unpack_halves(codes) if quant.row.bits == 4 else codes


def _chosen(values: list[Tensor], which: Tensor) -> Tensor:
    """At each place the value of that number; formats that cannot be gathered as bytes."""
    bits = torch.stack([v.view(torch.uint8) if v.element_size() == 1 else v for v in values])
    return bits.gather(0, which.unsqueeze(0)).squeeze(0).view(values[0].dtype)


def static_scale(activations: ActivationQuantConfig, amax: Tensor) -> Tensor:
    """Scales of inputs that reach amax: the largest of their codes stands for it (nvfp4: with the largest scale of a group)."""
    largest = 448 * 6 if activations.scheme == "nvfp4" else NUMBERS[ELEMENTS[activations.scheme]].largest
    return one_if_zero(amax / largest).to(torch.float32)


def _encoded(quant: QuantConfig, weight: Tensor, halves: int, factor: float) -> Codes:
    wide, row = weight.to(torch.float32), quant.row
    tiles = by_tile(wide * factor, quant.tile, halves)
    zero_point = global_scale = None
    if quant.zero_points:
        scale, zero_point = _scale_and_zero(tiles, 2**row.bits - 1)
    elif row.scale == "e4m3":
        scale, global_scale = _scales_of_nvfp4(wide, tiles, halves)  # the one above is of all weights, whatever the factor
    else:
        scale = _SCALES[row.element, row.scale](tiles)
    if row.scale == "float" and quant.granularity == "group" and weight.dtype in (torch.bfloat16, torch.float16):
        scale = scale.to(weight.dtype)
    step = spread(decode_scale(quant, scale, torch.float32), quant.tile, halves, *weight.shape[1:])
    if global_scale is not None:
        step = step * spread(global_scale, WHOLE, halves, *weight.shape[1:])
    units = torch.where(step == 0, 0, wide / step)
    if zero_point is None:
        codes = NUMBERS[row.element].encode(units)
    else:
        zeros = spread(zero_point.to(torch.float32), quant.tile, halves, *weight.shape[1:])
        codes = numbers.codes_around(zeros, units, 2**row.bits - 1)
    return Codes(codes=pack_halves(codes) if row.bits == 4 else codes, scale=scale, zero_point=zero_point, global_scale=global_scale)


def _amax(tiles: Tensor) -> Tensor:
    return tiles.abs().amax(-1)


def _scale_of_int4(tiles: Tensor) -> Tensor:
    largest = tiles.gather(-1, tiles.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return one_if_zero(largest / -8)


_SCALES = {
    ("e4m3", "float"): lambda tiles: one_if_zero(_amax(tiles) / 448),
    ("int8", "float"): lambda tiles: one_if_zero(_amax(tiles) / 127),
    ("int4", "float"): _scale_of_int4,
    ("e4m3", "e8m0"): lambda tiles: encode_e8m0(log2_ceil(_amax(tiles) / 448)),
    ("e2m1", "e8m0"): lambda tiles: encode_e8m0(log2_floor(_amax(tiles)) - 2),  # 2^2 is the largest power of two in e2m1
}


def _scale_and_zero(tiles: Tensor, top: int) -> tuple[Tensor, Tensor]:
    least, most = tiles.amin(-1).clamp(max=0), tiles.amax(-1).clamp(min=0)
    scale = one_if_zero((most - least) / top)
    return scale, (-least / scale).round().clamp(0, top).to(torch.uint8)


def _scales_of_nvfp4(wide: Tensor, tiles: Tensor, halves: int) -> tuple[Tensor, Tensor]:
    """Scales of the groups in e4m3, the largest of them 448, above them one of each half in float32."""
    global_scale = one_if_zero(_amax(by_tile(wide, WHOLE, halves)) / (448 * 6))
    above = spread(global_scale, WHOLE, halves, tiles.shape[1], tiles.shape[2])
    return (_amax(tiles) / 6 / above).clamp(max=448).to(torch.float8_e4m3fn), global_scale
