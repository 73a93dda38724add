"""Number formats of quantization: rounding to the nearest code, ties to even, and decoding, exact in every bit."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes of the codes 0..7; bit 3 is the sign


@dataclass(frozen=True)
class Number:
    """A number format: its largest magnitude, the floats of codes, and the nearest codes of floats (saturating).

    scale     tiles [..., weights] -> their float scales; None: the largest magnitude of a tile / largest
    exponent  largest magnitudes of tiles -> log2 of their power-of-two scales; None: the least scales that keep all
              weights in range
    """

    largest: float
    decode: Callable[[Tensor, torch.dtype], Tensor]
    encode: Callable[[Tensor], Tensor]
    scale: Callable[[Tensor], Tensor] | None = None
    exponent: Callable[[Tensor], Tensor] | None = None

    def exponent_of(self, amax: Tensor) -> Tensor:
        """log2 of the power-of-two scale of numbers up to amax."""
        return log2_ceil(amax / self.largest) if self.exponent is None else self.exponent(amax)


def _of_table(values: tuple[float, ...], codes: Tensor, dtype: torch.dtype) -> Tensor:
    table = torch.tensor(values, dtype=dtype, device=codes.device)
    return table[codes.to(torch.int32)]


def decode_e2m1(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The floats of codes 0..15."""
    return _of_table((*E2M1, *(-value for value in E2M1)), codes, dtype)


def encode_e2m1(values: Tensor) -> Tensor:
    """The nearest codes 0..15. Ties go to the even code: up from 0.75, 1.75 and 3.5, down from the others."""
    m = values.abs()
    code = torch.zeros_like(m, dtype=torch.uint8)
    for bound in (0.25, 1.25, 2.5, 5.0):
        code = code + (m > bound)
    for bound in (0.75, 1.75, 3.5):
        code = code + (m >= bound)
    return code | (torch.signbit(values).to(torch.uint8) << 3)


def encode_e4m3(values: Tensor) -> Tensor:
    """The nearest float8_e4m3fn, 448 at most."""
    return values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def _scale_of_int4(tiles: Tensor) -> Tensor:
    """Scales by which the weight of largest magnitude becomes -8, since two's complement has no +8."""
    return tiles.gather(-1, tiles.abs().argmax(-1, keepdim=True)).squeeze(-1) / -8


NUMBERS: dict[str, Number] = {
    "e4m3": Number(448.0, lambda codes, dtype: codes.to(dtype), encode_e4m3),
    "int8": Number(
        127.0, lambda codes, dtype: codes.to(dtype), lambda values: values.round().clamp(-128, 127).to(torch.int8)
    ),
    "int4": Number(
        8.0,
        lambda codes, dtype: codes.to(dtype) - 8,
        lambda values: (values.round().clamp(-8, 7) + 8).to(torch.uint8),
        scale=_scale_of_int4,
    ),
    # 2^2 is the largest power of two in e2m1
    "e2m1": Number(6.0, decode_e2m1, encode_e2m1, exponent=lambda amax: log2_floor(amax) - 2),
}


def decode_e8m0(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """2^(S - 127); NaN for S = 255.

    Uses a table: exponent bits alone would decode S = 0 as 0, and exp2 is not exact on every device.
    """
    return _of_table((*(2.0 ** (code - 127) for code in range(255)), torch.nan), codes, dtype)


def encode_e8m0(exponents: Tensor) -> Tensor:
    """The code of 2^exponent, for integral exponents, from 0 (2^-127) to 254 (2^127); 255 for NaN."""
    codes = torch.nan_to_num(exponents.clamp(-127, 127), nan=128.0) + 127
    return codes.to(torch.uint8)


def log2_floor(values: Tensor) -> Tensor:
    """floor(log2 v), exact for positive v; -inf for 0, v itself where it is infinite or NaN."""
    return _log2(values, torch.frexp(values).exponent - 1)


def log2_ceil(values: Tensor) -> Tensor:
    """ceil(log2 v), exact for positive v; -inf for 0, v itself where it is infinite or NaN."""
    mantissa, exponent = torch.frexp(values)
    return _log2(values, exponent - (mantissa == 0.5).to(exponent.dtype))


def _log2(values: Tensor, exponent: Tensor) -> Tensor:
    whole = torch.where(values.isfinite(), exponent.to(values.dtype), values)
    return torch.where(values > 0, whole, torch.where(values == 0, -torch.inf, torch.nan))


def one_if_zero(scale: Tensor) -> Tensor:
    """The scale, with 0 (of tiles that are all zeros) replaced by 1."""
    return torch.where(scale == 0, 1, scale)


def pack_halves(codes: Tensor) -> Tensor:
    """Packs two codes 0..15 into a byte, the even one in the low half: [..., 2 n] -> [..., n]."""
    pairs: Tensor = codes.unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_halves(packed: Tensor) -> Tensor:
    """The inverse of pack_halves.

    >>> unpack_halves(pack_halves(torch.tensor([1, 2, 15, 0], dtype=torch.uint8))).tolist()
    [1, 2, 15, 0]
    """
    codes: Tensor = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return codes


def codes_around(zeros: Tensor, units: Tensor, top: int) -> Tensor:
    """The codes in 0..top, uint8, of weights in units of their scale, with zero points `zeros`.

    The clamp is needed where a weight and its zero point are both halfway between two codes: both may be rounded up, to
    top + 1.

    >>> codes_around(torch.tensor(4.0), torch.tensor([-4.0, 0.6, 11.5]), 15).tolist()
    [0, 5, 15]
    """
    codes: Tensor = (units.round() + zeros).clamp(0, top).to(torch.uint8)
    return codes
