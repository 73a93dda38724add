"""Sizes that ranks exchange at runtime: the only host syncs of a layer, and only in formats of dispatch with
data-dependent sizes.
"""

import torch
from torch import Tensor

from moe_fn.config import ParallelConfig, RankGroup
from moe_fn.ops.collectives import reduced_over_ranks


def reads_sizes(parallel: ParallelConfig) -> bool:
    """Whether a layer reads sizes from tensors on the host: split sizes, or the largest number of tokens of a rank."""
    when = parallel.row.reads_sizes
    return when == "always" or (when == "without max_tokens" and parallel.max_tokens is None)


def longest_of_ranks(rows: int, group: RankGroup, like: Tensor) -> int:
    """The maximum over ranks of the number of rows."""
    return int(reduced_over_ranks(like.new_full((1,), rows), "max", group.name).item())


def sizes_on_host(counts: Tensor) -> list[list[int]]:
    """The entries of a matrix of counts as Python ints, each checked to be >= 0 for the compiler."""
    rows: list[list[int]] = counts.tolist()
    for row in rows:
        for number in row:
            torch._check(number >= 0)
    return rows
