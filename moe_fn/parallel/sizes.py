"""Sizes that ranks must tell each other: the only place where a layer waits for the device, and only in formats whose
sizes are data.
"""

import torch
from torch import Tensor

from moe_fn.config import ParallelConfig, RankGroup
from moe_fn.ops.collectives import reduced_over_ranks


def reads_sizes(parallel: ParallelConfig) -> bool:
    """Whether a layer reads numbers from tensors on the host: split sizes, or the most tokens that a rank has."""
    return parallel.dispatch == "all_to_all" or (parallel.dispatch == "all_gather" and parallel.max_tokens is None)


def longest_of_ranks(rows: int, group: RankGroup, like: Tensor) -> int:
    """The largest of the ranks' numbers of rows."""
    return int(reduced_over_ranks(like.new_full((1,), rows), "max", group.name).item())


def sizes_on_host(counts: Tensor) -> list[list[int]]:
    """The numbers of a matrix, none of them negative."""
    rows: list[list[int]] = counts.tolist()
    for row in rows:
        for number in row:
            torch._check(number >= 0)
    return rows
