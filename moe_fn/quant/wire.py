"""Rows sent between ranks as bytes of codes and scales, where the experts would round their inputs to codes anyway."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_fn.config import ActivationQuantConfig, MoEConfig
from moe_fn.config.quant import ELEMENTS
from moe_fn.quant.inputs import RoundedRows, rounded_rows
from moe_fn.quant.numbers import NUMBERS, decode_e8m0, encode_e8m0, log2_floor, pack_halves, unpack_halves


def travelling(config: MoEConfig, dtype: torch.dtype, weighted: bool) -> ActivationQuantConfig | None:
    """The quantization of rows that are sent, which is that of the first product's inputs; None: sent unrounded.

    Unrounded where scales differ by expert (static), where routing weights are multiplied with the received rows, where
    LoRA adapters need unrounded inputs, and in float64, whose scales are wider than those that are sent.

    Laws
        Rows arrive as the experts round them.
    """
    activations = None if config.quant is None or config.lora is not None else config.quant.activations
    if activations is None or activations.static or (config.router.weight_on == "input" and not weighted):
        return None
    return None if dtype == torch.float64 else activations


def bytes_of_row(a: ActivationQuantConfig, width: int) -> int:
    """Bytes of a row of `width` elements.

    >>> bytes_of_row(ActivationQuantConfig(scheme="int8", granularity="token"), 64)
    68
    """
    groups = -(-width // (a.group_size or width))
    return (-(-width // 2) if _packed(a) else width) + groups * (1 if _exponents(a) else 4)


def to_bytes(a: ActivationQuantConfig, rows: Tensor) -> Tensor:
    """Rows [R, K] as uint8 [R, bytes_of_row]: their codes, then their scales."""
    present = torch.ones(rows.shape[0], 1, dtype=torch.bool, device=rows.device)
    rounded = rounded_rows(a, rows, present, None)
    codes = NUMBERS[a.row.element].encode(rounded.codes)
    if _packed(a):
        codes = pack_halves(torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)))
    scale = encode_e8m0(log2_floor(rounded.scale)) if _exponents(a) else rounded.scale.to(torch.float32)
    return torch.cat([codes.view(torch.uint8), _contiguous_copy(scale).view(torch.uint8)], 1)


def from_bytes(a: ActivationQuantConfig, data: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The inverse of to_bytes, up to rounding: [R, bytes_of_row] uint8 -> [R, width]."""
    size = -(-width // 2) if _packed(a) else width
    codes, scale = data.narrow(1, 0, size), _contiguous_copy(data.narrow(1, size, data.shape[1] - size))
    values = (
        unpack_halves(codes).narrow(1, 0, width)
        if _packed(a)
        else codes.contiguous().view(ELEMENTS[a.row.element].dtype)
    )
    numbers = NUMBERS[a.row.element].decode(values, torch.float32)
    scales = decode_e8m0(scale, torch.float32) if _exponents(a) else scale.view(torch.float32)
    return RoundedRows(numbers, scales, a.group_size or width).floats().to(dtype)


def _contiguous_copy(t: Tensor) -> Tensor:
    """A contiguous copy, which can be viewed as another dtype.

    contiguous() returns 0 rows and 1 row as they are, with any stride and offset.
    """
    return t.clone(memory_format=torch.contiguous_format)


def _packed(a: ActivationQuantConfig) -> bool:
    return a.row.bits == 4


def _exponents(a: ActivationQuantConfig) -> bool:
    """Whether scales are sent as exponents of one byte, not as float32."""
    return a.row.scale == "e8m0"


def packed(a: ActivationQuantConfig | None, rows: Tensor) -> Tensor:
    """The tensor to send: rows, or their bytes, which have no gradient."""
    return rows if a is None else to_bytes(a, rows.detach())


def unpacked(
    a: ActivationQuantConfig | None, data: Tensor, rows: Tensor, arrived_as: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The received rows in the dtype of `rows`; arrived_as(rows, received) attaches the gradient of the collective."""
    return data if a is None else arrived_as(rows, from_bytes(a, data, rows.shape[1], rows.dtype))
