"""reduce_and_trunc: the sum over ranks, and the cut to the width of the model."""

import torch.distributed._functional_collectives as collectives
from torch import Tensor


def reduce_and_trunc(y: Tensor, *, group: str | None = None, width: int | None = None) -> Tensor:
    """Sum over the ranks of a process group, then keep the first `width` columns; either may be None.

        y[t, :width] summed over the group

    y [..., columns] -> [..., width]. `group` is the name of a process group of torch.distributed. Raises ValueError where there are
    fewer columns than width.

    Laws
        Without a group nothing but columns is lost.

    >>> import torch
    >>> reduce_and_trunc(torch.tensor([[1.0, 2.0, 0.0]]), width=2)
    tensor([[1., 2.]])
    """
    if group is not None:
        y = collectives.all_reduce(y, "sum", group)  # type: ignore[arg-type]
    if width is None or width == y.shape[-1]:
        return y
    if width > y.shape[-1]:
        raise ValueError(f"reduce_and_trunc: y has {y.shape[-1]} columns; expected at least width={width}")
    return y.narrow(-1, 0, width)
