"""Cutting one weight into the parts of ranks: experts along their dim, slices along the dim in the table of weights."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.records import Path
from moe_fn.weights.spec import cut_of, dims_of_weight, slices_of_axes


def own_part(config: MoEConfig, path: Path, t: Tensor, experts: Tensor) -> Tensor:
    """This rank's part of a weight: `experts` where it has a dim of experts, and this rank's slice of each.

    Returns `t` itself where the part is the whole.
    """
    dim = _dim_of_experts(config, path)
    own = t if dim is None or len(experts) == t.shape[dim] else t.index_select(dim, experts)
    for axis, (slices, number) in slices_of_axes(config.parallel).items():
        cut = cut_of(config, path, axis)
        own = own if cut is None else slice_of(own, *cut, slices, number)
    return own


def whole_of(config: MoEConfig, path: Path, piece_of: Callable[[int, int], Tensor], places: Tensor) -> Tensor:
    """The inverse of own_part.

    piece_of(rank of ep, slice) returns a part; places[e] is the index of expert e in the concatenation over ranks.
    """
    cuts = [
        (cut, n)
        for axis, (n, _) in slices_of_axes(config.parallel).items()
        if (cut := cut_of(config, path, axis)) is not None
    ]

    def of_rank(rank: int) -> Tensor:
        for cut, slices in cuts:  # at most one
            return joined([piece_of(rank, number) for number in range(slices)], *cut)
        return piece_of(rank, 0)

    dim, ranks = _dim_of_experts(config, path), config.parallel.ep.size if config.parallel and config.parallel.ep else 1
    return (
        of_rank(0)
        if dim is None
        else torch.cat([of_rank(rank) for rank in range(ranks)], dim).index_select(dim, places)
    )


def _dim_of_experts(config: MoEConfig, path: Path) -> int | None:
    """The dim of experts; None where the weight has none or all experts share it."""
    dims = dims_of_weight(config, path)
    return dims.index(("E",)) if ("E",) in dims else None


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
