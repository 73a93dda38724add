"""Rounding of the inputs of products to codes and scales: the published formulas, one row of a table each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fn.config import ActivationQuantConfig
from moe_fn.quant.numbers import NUMBERS, Number, decode_e8m0, encode_e8m0, log2_ceil, one_if_zero

_E4M3_LEAST = 1 / (448 * 512)  # least scale of a token, as in vLLM's kernel


@dataclass(frozen=True)
class RoundedRows:
    """rows = codes * scale: codes [R, K] as floats, scale [R or 1, 1 or groups] float32."""

    codes: Tensor
    scale: Tensor
    group_size: int

    def floats(self) -> Tensor:
        """The rows as floats [R, K]."""
        return self.codes * _expand_scale(self.scale, self.group_size, self.codes.shape[-1])


def rounded_rows(
    config: ActivationQuantConfig, rows: Tensor, present: Tensor, static_scale: Tensor | None
) -> RoundedRows:
    """Rows [R, K] as codes and scales.

        scale = f(largest magnitude of the inputs that share it);  codes = round(row / scale), saturating

    present [R, 1] bool: rows that count for a scale of all rows; static_scale [R, 1], or None. Computed in float32, or
    in float64 for float64 rows. Source: vLLM 0.33, OCP microscaling formats 1.0, compressed-tensors (nvfp4).
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    size = config.group_size or rows.shape[-1]
    groups = _by_group(wide, size)
    amax = groups.abs().amax(-1)
    row, number = config.row, NUMBERS[config.row.element]
    if row.has_global_scale:
        largest = NUMBERS[row.scale].largest * number.largest
        above = static_scale if static_scale is not None else one_if_zero(amax.amax(-1, keepdim=True) / largest)
        units, scale = _units_of_two_levels(row.scale, number, groups, amax, above)
    else:
        if config.granularity == "tensor" and static_scale is None:
            amax = torch.where(present, amax, 0).amax(0, keepdim=True) if rows.shape[0] else amax.new_zeros(1, 1)
        if static_scale is not None:
            scale = static_scale
        elif row.scale == "e8m0":
            scale = _power_of_two(number.exponent_of(amax))
        else:
            scale = _SCALES[row.element, config.granularity](amax)
        if config.power_of_two_scales:
            scale = _power_of_two(log2_ceil(scale))
        units = groups / scale.unsqueeze(-1)
    codes = round_to(number, units).flatten(1).narrow(1, 0, rows.shape[1])
    return RoundedRows(codes, scale, size)


def round_to(number: Number, units: Tensor) -> Tensor:
    """The nearest number of a format, as a float; saturating."""
    return number.decode(number.encode(units), units.dtype)


def straight_through(rounded: Tensor, rows: Tensor) -> Tensor:
    """`rounded` with the gradient of `rows`: rows - rows is 0, so adding it changes no bit."""
    return rounded.detach() + (rows - rows.detach())


def _units_of_two_levels(
    stored: str, number: Number, groups: Tensor, amax: Tensor, above: Tensor
) -> tuple[Tensor, Tensor]:
    """Values to be rounded, and the scales of groups: `stored` numbers times the scale `above` them."""
    scale = round_to(NUMBERS[stored], amax / (number.largest * above))
    units = groups / above.unsqueeze(-1) / scale.unsqueeze(-1)
    return torch.where(scale.unsqueeze(-1) == 0, 0, units), scale * above


def _power_of_two(exponents: Tensor) -> Tensor:
    return decode_e8m0(encode_e8m0(exponents), exponents.dtype)


Scales = Callable[[Tensor], Tensor]
_SCALES: dict[tuple[str, str], Scales] = {  # largest magnitude -> float scale
    ("e4m3", "tensor"): lambda amax: amax.clamp(min=1e-10) / 448,
    ("e4m3", "token"): lambda amax: (amax / 448).clamp(min=_E4M3_LEAST),
    ("e4m3", "group"): lambda amax: amax.clamp(min=1e-10) / 448,
    ("int8", "tensor"): lambda amax: (amax / 127).clamp(min=1e-10),
    ("int8", "token"): lambda amax: amax.clamp(min=1e-10) / 127,
    ("int8", "group"): lambda amax: amax.clamp(min=1e-10) / 127,
}


def _by_group(rows: Tensor, size: int) -> Tensor:
    """[R, K] -> [R, groups, size], padded with zeros."""
    padded: Tensor = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % size))
    groups: Tensor = padded.unflatten(-1, (-1, size))
    return groups


def _expand_scale(scale: Tensor, size: int, inputs: int) -> Tensor:
    return scale.repeat_interleave(size, -1).narrow(-1, 0, inputs) if scale.shape[-1] > 1 else scale
