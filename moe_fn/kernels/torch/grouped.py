"""Grouped products in plain torch: a loop over experts on the CPU, a loop over fixed blocks of rows elsewhere.

The loop over experts reads the ends on the host, which is free on a CPU and a sync on a GPU; so other devices take
blocks, whose number follows from the shapes alone. Groups, segments and weight sets are those of
`moe_fn.ops.grouped_matmul`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fn.kernels.torch.support import problem
from moe_fn.numerics import accumulation_dtype

BLOCK_ROWS = 64  # rows of a block off the CPU; a group wastes at most one block
BLOCKS_AT_A_TIME = 64  # weights of so many blocks are copied at once


def grouped_matmul(
    rows: Tensor,
    weight: Tensor,
    ends: Tensor,
    transposed: bool,
    segments: int,
    weight_sets: int,
    invariant: bool = False,
) -> Tensor:
    if transposed:
        weight = weight.transpose(1, 2)
    if rows.device.type != "cpu":
        wrong = problem(rows.device.type, rows.dtype, invariant)
        if wrong is not None:
            raise ValueError(f"grouped_matmul: {wrong}")
        return blocked_matmul(rows, weight, ends, segments, weight_sets)
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    done = 0
    for index, start, end in _groups(ends, rows.shape[0], segments, weight_sets):
        if start > done:
            out[done:start].zero_()  # the last segment's rows of no expert
        if end > start:
            _multiply(rows[start:end], weight[index], out[start:end], invariant)
        done = end
    out[done:].zero_()
    return out


def _multiply(rows: Tensor, weight: Tensor, out: Tensor, invariant: bool) -> None:
    """out = rows @ weight on the CPU.

    invariant: row by row, each in its own memory: BLAS chooses kernels by sizes and by alignment.
    """
    if not invariant:
        torch.mm(rows, weight, out=out)
    else:
        for row, to in zip(rows.split(1), out.split(1), strict=True):
            to.copy_(torch.mm(row.clone(), weight))


def grouped_outer(left: Tensor, right: Tensor, ends: Tensor, segments: int, weight_sets: int) -> Tensor:
    if left.device.type != "cpu":
        return blocked_outer(left, right, ends, segments, weight_sets)
    shared = segments > weight_sets
    shape = weight_sets * (ends.numel() // segments), left.shape[1], right.shape[1]
    out = left.new_zeros(shape, dtype=accumulation_dtype(left.dtype)) if shared else left.new_empty(shape)
    for index, start, end in _groups(ends, left.shape[0], segments, weight_sets):
        if shared:
            out[index] += left[start:end].t() @ right[start:end]
        elif end > start:
            torch.mm(left[start:end].t(), right[start:end], out=out[index])
        else:
            out[index].zero_()
    return out.to(left.dtype)


def _groups(ends: Tensor, rows: int, segments: int, weight_sets: int) -> Iterator[tuple[int, int, int]]:
    """(weight index, start, end) of every group, in order."""
    experts, rows_of_segment = ends.numel() // segments, rows // segments
    last = 0
    for group, end in enumerate(ends.tolist()):
        segment, expert = divmod(group, experts)
        start = segment * rows_of_segment if expert == 0 else last
        last = end
        yield segment * weight_sets // segments * experts + expert, start, end


@dataclass(frozen=True)
class _Blocks:
    """Fixed-size pieces of the groups' rows. Their number is the worst case over all ends, so it needs no host sync."""

    rows: Tensor  # [blocks, BLOCK_ROWS]: row numbers, `rows` where there is none
    weights: Tensor  # [blocks]: index of the weight


def _blocks(ends: Tensor, rows: int, segments: int, weight_sets: int) -> _Blocks:
    experts, device = ends.numel() // segments, ends.device
    ends = ends.to(torch.int64).view(segments, experts)
    first = torch.arange(segments, device=device).unsqueeze(1) * (rows // segments)
    starts = torch.cat([first, ends.narrow(1, 0, experts - 1)], 1).flatten()
    ends = ends.flatten()
    block_ends = ((ends - starts + BLOCK_ROWS - 1) // BLOCK_ROWS).cumsum(0)
    number = torch.arange(rows // BLOCK_ROWS + ends.numel(), device=device)
    group = torch.searchsorted(block_ends, number, right=True)
    used = (group < ends.numel()).unsqueeze(1)
    group = group.clamp(max=ends.numel() - 1)
    first_block = block_ends - (ends - starts + BLOCK_ROWS - 1) // BLOCK_ROWS
    base = starts.index_select(0, group) + (number - first_block.index_select(0, group)) * BLOCK_ROWS
    row = base.unsqueeze(1) + torch.arange(BLOCK_ROWS, device=device)
    row = torch.where(used & (row < ends.index_select(0, group).unsqueeze(1)), row, rows)
    return _Blocks(row, group // experts * weight_sets // segments * experts + group % experts)


def _with_empty_row(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def blocked_matmul(rows: Tensor, weight: Tensor, ends: Tensor, segments: int, weight_sets: int) -> Tensor:
    """grouped_matmul without reading the ends: every block gathers its rows and its weight. weight is [E, K, N]."""
    blocks = _blocks(ends, rows.shape[0], segments, weight_sets)
    padded = _with_empty_row(rows)
    out = rows.new_zeros(rows.shape[0] + 1, weight.shape[2])
    for row, index in zip(blocks.rows.split(BLOCKS_AT_A_TIME), blocks.weights.split(BLOCKS_AT_A_TIME), strict=True):
        some = padded.index_select(0, row.flatten()).unflatten(0, row.shape)
        out.index_copy_(0, row.flatten(), torch.bmm(some, weight.index_select(0, index)).flatten(0, 1))
    return out.narrow(0, 0, rows.shape[0])


def blocked_outer(left: Tensor, right: Tensor, ends: Tensor, segments: int, weight_sets: int) -> Tensor:
    """grouped_outer without reading the ends; one block at a time, so sums have a fixed order and no atomics."""
    blocks = _blocks(ends, left.shape[0], segments, weight_sets)
    padded_left, padded_right = _with_empty_row(left), _with_empty_row(right)
    experts = ends.numel() // segments
    out = left.new_zeros(weight_sets * experts, left.shape[1], right.shape[1], dtype=accumulation_dtype(left.dtype))
    for row, index in zip(blocks.rows.unbind(0), blocks.weights.split(1), strict=True):
        product = padded_left.index_select(0, row).t() @ padded_right.index_select(0, row)
        out.index_add_(0, index, product.unsqueeze(0).to(out.dtype))
    return out.to(left.dtype)
