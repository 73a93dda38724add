"""Quantized matrices: encoding to codes and scales, and decoding, tile by tile."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from moe_fn.config import QuantConfig
from moe_fn.numerics import accumulation_dtype
from moe_fn.quant import numbers
from moe_fn.quant.numbers import NUMBERS, Number, decode_e8m0, encode_e8m0, one_if_zero, pack_halves, unpack_halves
from moe_fn.quant.tiles import WHOLE, Tile, by_tile, expand_tiles
from moe_fn.records import MoEWeights, QuantWeights

NAMES = ("gate_up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codes:
    """gate_up or down as codes, with scales and optional zero points."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None


def codes_of(weights: MoEWeights, name: str) -> Codes:
    """The codes, scales and zero points of gate_up or down."""
    return with_scales(getattr(weights, name), weights.quant, name)


def with_scales(codes: Tensor, quant: QuantWeights | None, name: str) -> Codes:
    """The codes of gate_up or down with its scales and zero points."""
    scale = None if quant is None else getattr(quant, f"{name}_scale")
    if quant is None or scale is None:
        raise ValueError(f"weights.quant.{name}_scale is None; expected a tensor, since config.quant is given")
    return Codes(
        codes=codes,
        scale=scale,
        zero_point=getattr(quant, f"{name}_zero_point"),
        global_scale=getattr(quant, f"{name}_global_scale"),
    )


def decoded(quant: QuantConfig, stored: Codes, halves: int, dtype: torch.dtype) -> Tensor:
    """Decoded weights: [E, outputs, inputs] in dtype, computed in float32 or wider."""
    wide, row = accumulation_dtype(dtype), quant.row
    codes = _apart(quant, stored.codes)
    size = codes.shape[1], codes.shape[2]

    def at_all_places(values: Tensor, tile: Tile) -> Tensor:
        return expand_tiles(values, tile, halves, *size)

    if stored.zero_point is None:
        values = NUMBERS[row.element].decode(codes, wide)
    else:
        values = codes.to(wide) - at_all_places(stored.zero_point.to(wide), quant.tile)
    values = values * at_all_places(decode_scale(quant, stored.scale, wide), quant.tile)
    if stored.global_scale is not None:
        values = values * at_all_places(stored.global_scale.to(wide), WHOLE)
    return values.to(dtype)


def decode_scale(quant: QuantConfig, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as floats, decoded from their storage format."""
    return decode_e8m0(scale, dtype) if quant.row.scale == "e8m0" else scale.to(dtype)


# Factors of the least scale with no weight of a tile out of range: clipping few large weights can reduce the error of
# many small ones.
FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def encoded(quant: QuantConfig, weight: Tensor, halves: int, importance: Tensor | None = None) -> Codes:
    """The nearest codes of float weights [E, outputs, inputs], and their scales.

    With the importance of inputs [E, inputs], each tile has the scale of FACTORS with the least weighted squared error.
    """
    if importance is None:
        return _encoded(quant, weight, halves, 1.0)
    found = [_encoded(quant, weight, halves, factor) for factor in FACTORS]
    errors = []
    for codes in found:
        difference = decoded(quant, codes, halves, torch.float32) - weight.to(torch.float32)
        errors.append(by_tile(difference.square() * importance.unsqueeze(1), quant.tile, halves).sum(-1))
    best = torch.stack(errors).argmin(0)  # of each tile
    of_weight = expand_tiles(best, quant.tile, halves, weight.shape[1], weight.shape[2])
    zero_points = [codes.zero_point for codes in found if codes.zero_point is not None]
    # Unpacked: the two codes of a byte may be in two tiles.
    chosen = _chosen([_apart(quant, codes.codes) for codes in found], of_weight)
    return Codes(
        codes=pack_halves(chosen) if quant.row.bits == 4 else chosen,
        scale=_chosen([codes.scale for codes in found], best),
        zero_point=_chosen(zero_points, best) if zero_points else None,
        global_scale=found[0].global_scale,
    )


def _apart(quant: QuantConfig, codes: Tensor) -> Tensor:
    """Codes with one element each: 4-bit codes are unpacked."""
    return unpack_halves(codes) if quant.row.bits == 4 else codes


def _chosen(values: list[Tensor], which: Tensor) -> Tensor:
    """Elementwise values[which], gathered as bytes where gather does not support the dtype."""
    bits = torch.stack([v.view(torch.uint8) if v.element_size() == 1 else v for v in values])
    return bits.gather(0, which.unsqueeze(0)).squeeze(0).view(values[0].dtype)


def _encoded(quant: QuantConfig, weight: Tensor, halves: int, factor: float) -> Codes:
    wide, row = weight.to(torch.float32), quant.row
    tiles = by_tile(wide * factor, quant.tile, halves)
    zero_point = global_scale = None
    if quant.zero_points:
        scale, zero_point = _scale_and_zero(tiles, 2**row.bits - 1)
    else:
        scale, global_scale = SCALES[row.scale](NUMBERS[row.element], wide, tiles, halves)
    if row.scale == "float" and quant.granularity == "group" and weight.dtype in (torch.bfloat16, torch.float16):
        scale = scale.to(weight.dtype)
    step = expand_tiles(decode_scale(quant, scale, torch.float32), quant.tile, halves, *weight.shape[1:])
    if global_scale is not None:
        step = step * expand_tiles(global_scale, WHOLE, halves, *weight.shape[1:])
    units = torch.where(step == 0, 0, wide / step)
    if zero_point is None:
        codes = NUMBERS[row.element].encode(units)
    else:
        zeros = expand_tiles(zero_point.to(torch.float32), quant.tile, halves, *weight.shape[1:])
        codes = numbers.codes_around(zeros, units, 2**row.bits - 1)
    return Codes(
        codes=pack_halves(codes) if row.bits == 4 else codes,
        scale=scale,
        zero_point=zero_point,
        global_scale=global_scale,
    )


def _amax(tiles: Tensor) -> Tensor:
    return tiles.abs().amax(-1)


def _scale_and_zero(tiles: Tensor, top: int) -> tuple[Tensor, Tensor]:
    least, most = tiles.amin(-1).clamp(max=0), tiles.amax(-1).clamp(min=0)
    scale = one_if_zero((most - least) / top)
    return scale, (-least / scale).round().clamp(0, top).to(torch.uint8)


def _float_scale(number: Number, tiles: Tensor) -> Tensor:
    return _amax(tiles) / number.largest if number.scale is None else number.scale(tiles)


def _two_levels(number: Number, wide: Tensor, tiles: Tensor, halves: int) -> tuple[Tensor, Tensor]:
    """Scales of tiles in e4m3, the largest of them 448, and global scales of halves in float32.

    Global scales are those of the weights `wide`, which have no factor of FACTORS, unlike `tiles`.
    """
    global_scale = one_if_zero(_amax(by_tile(wide, WHOLE, halves)) / (448 * number.largest))
    above = expand_tiles(global_scale, WHOLE, halves, tiles.shape[1], tiles.shape[2])
    return (_amax(tiles) / number.largest / above).clamp(max=448).to(torch.float8_e4m3fn), global_scale


# Scales of tiles, and global scales: a row for each of moe_fn.config.quant.SCALES.
SCALES: dict[str, Callable[[Number, Tensor, Tensor, int], tuple[Tensor, Tensor | None]]] = {
    "float": lambda number, wide, tiles, halves: (one_if_zero(_float_scale(number, tiles)), None),
    "e8m0": lambda number, wide, tiles, halves: (encode_e8m0(number.exponent_of(_amax(tiles))), None),
    "e4m3": _two_levels,
}
