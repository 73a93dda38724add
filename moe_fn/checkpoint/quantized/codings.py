"""How numbers lie in a quantized file's tensors, and the functions that lay them as `MoEWeights` and `QuantWeights`
have them.

Nothing is rounded here, but for the inverse of a global scale: codes change places and offsets, scales their dtype for
a wider one.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_fn.quant.numbers import decode_e8m0, unpack_halves

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_AWQ_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # column j of eight is in this nibble


@dataclass(frozen=True)
class Coding:
    """dtypes  in memory, of each that a file may have
    decode   from a piece of the file to one in memory; along `dim` of the piece every element becomes `times` elements
    """

    dtypes: Mapping[str, torch.dtype]
    decode: Callable[[Tensor], Tensor] = field(default=lambda t: t)
    dim: int = -1
    times: int = 1


def _as_bytes(t: Tensor) -> Tensor:
    """[..., n] int32 -> [..., 4 n], the low byte first, whatever order the machine has."""
    # Of a single column any stride passes as contiguous, and a view as bytes wants 1.
    laid: Tensor = (
        t.contiguous().flatten().as_strided((t.numel(),), (1,)).view(torch.uint8).unflatten(0, (*t.shape[:-1], -1))
    )
    return laid if sys.byteorder == "little" else laid.unflatten(-1, (-1, 4)).flip(-1).flatten(-2)


def _other_sign(t: Tensor) -> Tensor:
    """q + 128 of q, and the other way round: the same bits but the first."""
    codes: Tensor = t.contiguous().view(torch.uint8) ^ 128
    return codes if t.dtype == torch.int8 else codes.view(torch.int8)


def _unpack(t: Tensor, bits: int, dim: int) -> Tensor:
    """int32, each 32 / bits codes along dim, the low bits first -> uint8, one code each."""
    if dim == -2:
        return _unpack(t.transpose(-1, -2), bits, -1).transpose(-1, -2)
    return _as_bytes(t) if bits == 8 else unpack_halves(_as_bytes(t))


def _unpack_awq(t: Tensor) -> Tensor:
    eights: Tensor = unpack_halves(_as_bytes(t)).unflatten(-1, (-1, 8))
    # an index of all at once takes 16 times as long
    return torch.stack([eights[..., place] for place in _AWQ_PLACE], -1).flatten(-2)


def _plus_1(codes: Tensor, bits: int) -> Tensor:
    """GPTQ's first format has zero points less one; of 2^bits - 1 that is 0."""
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
    "float32, agreed": Coding(dict.fromkeys(_FLOATS, torch.float32), lambda t: t.to(torch.float32)),  # by gate and up
    "inverse": Coding(dict.fromkeys(_FLOATS, torch.float32), lambda t: 1 / t.to(torch.float32)),
    "e8m0, spread": Coding(
        {"F8_E8M0": torch.float32, "U8": torch.float32, **_FLOATS},
        lambda t: t if t.is_floating_point() and t.itemsize > 1 else decode_e8m0(t.view(torch.uint8), torch.float32),
    ),
    "awq": Coding({"I32": torch.uint8}, _unpack_awq, -1, 8),
    "rows of words": _unpacked(8, -2),  # bytes of one code or two, as memory has them the other way round
    "rows of words, shifted": Coding({"I32": torch.int8}, lambda t: _other_sign(_unpack(t, 8, -2)), -2, 4),
    **{f"rows of {bits} bits": _unpacked(bits, -2) for bits in (4, 8)},
    **{f"columns of {bits} bits": _unpacked(bits, -1) for bits in (4, 8)},
    **{
        f"columns of {bits} bits, less 1": _unpacked(bits, -1, functools.partial(_plus_1, bits=bits)) for bits in (4, 8)
    },
}


def check_sizes(where: str, t: Tensor, sizes: tuple[int, ...]) -> None:
    """compressed-tensors' weight_shape."""
    if tuple(map(int, t)) != sizes:
        raise ValueError(f"{where} is {list(map(int, t))}; expected {list(sizes)}, as the config has it")


def check_order(where: str, t: Tensor, group: int | None) -> None:
    """GPTQ's g_idx: without act-order, each group is `group` inputs in a row."""
    expected = torch.arange(t.numel()) // (group or t.numel())
    if not torch.equal(t.to(torch.int64).flatten(), expected):
        raise ValueError(f"{where} puts inputs into other groups than {group} in a row; expected no act-order")


def check_zeros(where: str, zeros: Tensor, middle: int) -> None:
    """Zero points of a symmetric method."""
    if bool((zeros != middle).any()):
        raise ValueError(
            f"{where} has zero points other than {middle}; expected that one everywhere, for the config says symmetric"
        )
