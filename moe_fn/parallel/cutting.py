"""Slices of a dim that consists of equal parts, such as gates and ups."""

from collections.abc import Sequence

import torch
from torch import Tensor


def slice_of(t: Tensor, dim: int, parts: int, slices: int, number: int) -> Tensor:
    """Slice `number` of each of `parts` equal parts of a dim."""
    if slices == 1:
        return t
    by_part: Tensor = t.unflatten(dim, (parts, slices, -1))
    return by_part.select(dim + 1, number).flatten(dim, dim + 1).contiguous()


def joined(pieces: Sequence[Tensor], dim: int, parts: int) -> Tensor:
    """The inverse of slice_of, from the pieces of all slices in order."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.stack([piece.unflatten(dim, (parts, -1)) for piece in pieces], dim + 1).flatten(dim, dim + 2)
