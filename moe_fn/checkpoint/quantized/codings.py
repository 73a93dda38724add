"""Storage formats of quantized tensors in checkpoint files, and their conversion to the layout of `QuantWeights`.

Only the inverse of a global scale is rounded: codes are rearranged and shifted, scales are cast to a wider dtype.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_fn.quant.numbers import decode_e8m0, unpack_halves

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_AWQ_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that holds column j of eight


@dataclass(frozen=True)
class Coding:
    """Storage format of one tensor.

    dtypes  dtype in memory for each dtype that a file may have
    decode  converts a piece of the file to memory; along `dim` of the piece every element becomes `times` elements
    """

    dtypes: Mapping[str, torch.dtype]
    decode: Callable[[Tensor], Tensor] = field(default=lambda t: t)
    dim: int = -1
    times: int = 1


def _as_bytes(t: Tensor) -> Tensor:
    """[..., n] int32 to [..., 4 n] uint8, low bytes first on any machine."""
    # A single column is contiguous with any stride, but view(uint8) needs stride 1.
    in_bytes: Tensor = (
        t.contiguous().flatten().as_strided((t.numel(),), (1,)).view(torch.uint8).unflatten(0, (*t.shape[:-1], -1))
    )
    return in_bytes if sys.byteorder == "little" else in_bytes.unflatten(-1, (-1, 4)).flip(-1).flatten(-2)


def _other_sign(t: Tensor) -> Tensor:
    """int8 q to uint8 q + 128, and uint8 q to int8 q - 128: the top bit is flipped."""
    codes: Tensor = t.contiguous().view(torch.uint8) ^ 128
    return codes if t.dtype == torch.int8 else codes.view(torch.int8)


def _unpack(t: Tensor, bits: int, dim: int) -> Tensor:
    """Unpacks int32 with 32 / bits codes each along dim, low bits first.

    Returns uint8 with one code per byte.
    """
    if dim == -2:
        return _unpack(t.transpose(-1, -2), bits, -1).transpose(-1, -2)
    return _as_bytes(t) if bits == 8 else unpack_halves(_as_bytes(t))


def _unpack_awq(t: Tensor) -> Tensor:
    eights: Tensor = unpack_halves(_as_bytes(t)).unflatten(-1, (-1, 8))
    # indexing with the whole permutation takes 16 times as long
    return torch.stack([eights[..., place] for place in _AWQ_PLACE], -1).flatten(-2)


def _plus_1(codes: Tensor, bits: int) -> Tensor:
    """Zero points of GPTQ's first format, which stores them less 1 modulo 2^bits."""
    zeros: Tensor = (codes + 1) & (2**bits - 1)
    return zeros


def _unpacked(bits: int, dim: int, then: Callable[[Tensor], Tensor] = lambda t: t) -> Coding:
    return Coding({"I32": torch.uint8}, lambda t: then(_unpack(t, bits, dim)), dim, 32 // bits)


CODINGS: dict[str, Coding] = {
    "fp8": Coding({"F8_E4M3": torch.float8_e4m3fn}),
    "int8": Coding({"I8": torch.int8}),
    "int8, shifted": Coding({"I8": torch.uint8}, _other_sign),
    "int4 in int8": Coding({"I8": torch.uint8}, lambda t: (t + 8).view(torch.uint8)),
    "bytes": Coding(dict.fromkeys(("U8", "I8", "F8_E8M0", "F4"), torch.uint8), lambda t: t.view(torch.uint8)),
    "bytes of words": Coding({"I32": torch.uint8}, _as_bytes, -1, 4),
    "int8 of words": Coding({"I32": torch.int8}, lambda t: _other_sign(_as_bytes(t)), -1, 4),
    "blocks": Coding({"U8": torch.uint8}, lambda t: t.flatten(-2), -1, 16),
    "float": Coding(_FLOATS),
    "float32": Coding(dict.fromkeys(_FLOATS, torch.float32), lambda t: t.to(torch.float32)),
    # equal for gate and up
    "float32, agreed": Coding(dict.fromkeys(_FLOATS, torch.float32), lambda t: t.to(torch.float32)),
    "inverse": Coding(dict.fromkeys(_FLOATS, torch.float32), lambda t: 1 / t.to(torch.float32)),
    "e8m0, spread": Coding(
        {"F8_E8M0": torch.float32, "U8": torch.float32, **_FLOATS},
        lambda t: t if t.is_floating_point() and t.itemsize > 1 else decode_e8m0(t.view(torch.uint8), torch.float32),
    ),
    "awq": Coding({"I32": torch.uint8}, _unpack_awq, -1, 8),
    "rows of words": _unpacked(8, -2),  # bytes of one or two codes, transposed in memory
    "rows of words, shifted": Coding({"I32": torch.int8}, lambda t: _other_sign(_unpack(t, 8, -2)), -2, 4),
    **{f"rows of {bits} bits": _unpacked(bits, -2) for bits in (4, 8)},
    **{f"columns of {bits} bits": _unpacked(bits, -1) for bits in (4, 8)},
    **{
        f"columns of {bits} bits, less 1": _unpacked(bits, -1, functools.partial(_plus_1, bits=bits)) for bits in (4, 8)
    },
}


def check_sizes(where: str, t: Tensor, sizes: tuple[int, ...]) -> None:
    """Raises ValueError if compressed-tensors' weight_shape differs from the config's sizes."""
    if tuple(map(int, t)) != sizes:
        raise ValueError(f"{where} is {list(map(int, t))}; expected {list(sizes)} as in the config")


def check_order(where: str, t: Tensor, group: int | None) -> None:
    """Raises ValueError if GPTQ's g_idx has act-order: expected are groups of `group` consecutive inputs."""
    expected = torch.arange(t.numel()) // (group or t.numel())
    if not torch.equal(t.to(torch.int64).flatten(), expected):
        raise ValueError(f"{where} has groups other than {group} consecutive inputs; expected no act-order")


def check_zeros(where: str, zeros: Tensor, middle: int) -> None:
    """Raises ValueError if a zero point of a symmetric method differs from the middle of the range."""
    if bool((zeros != middle).any()):
        raise ValueError(
            f"{where} has zero points other than {middle}; expected {middle}, because the config says symmetric"
        )
