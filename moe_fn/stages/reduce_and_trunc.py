"""reduce_and_trunc: the sum over ranks, and the cut of hidden padding."""

from torch import Tensor

from moe_fn.checks import check_kind
from moe_fn.config import RankGroup
from moe_fn.ops.collectives import sum_over_ranks
from moe_fn.stages._checks import check_reduce


def reduce_and_trunc(y: Tensor, *, group: RankGroup | None = None, width: int | None = None) -> Tensor:
    """Sums over the ranks of a group, then keeps the first `width` columns; either may be None.

        y[t, :width] summed over the group

    y [..., columns] -> [..., width]. The table in `moe_fn.layer.compose` has the groups and places
    of sums. The result and its gradient are the same on each rank; the backward pass does not sum again. Raises
    ValueError for fewer columns than width.

    Laws
        Without a group only padding columns are cut.

    >>> import torch
    >>> reduce_and_trunc(torch.tensor([[1.0, 2.0, 0.0]]), width=2)
    tensor([[1., 2.]])
    """
    check_reduce(y, width)
    if group is not None:
        check_kind("reduce_and_trunc", "group", group, RankGroup)
    y = sum_over_ranks(y, group)
    if width is None or width == y.shape[-1]:
        return y
    if width > y.shape[-1]:
        raise ValueError(f"reduce_and_trunc: y has {y.shape[-1]} columns; expected at least width={width}")
    return y.narrow(-1, 0, width)
