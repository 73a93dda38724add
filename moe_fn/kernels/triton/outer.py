# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Sums over the rows of each group in row order: outer products (gradients of weights) and weighted sums (gradients of
biases).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fn.kernels.triton.tiles import Tile


@triton.jit
def _outer_kernel(
    left, right, out, slot_of_row, starts, ends, M, N, stride_left, stride_right,
    TOP_K: tl.constexpr, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of out[g] = left[rows of g].T @ right[rows of g], zeros for a group without rows; programs are ordered
    by group.
    """
    column_tiles = tl.cdiv(N, BN)
    tiles = tl.cdiv(M, BM) * column_tiles
    group = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    m = tile // column_tiles * BM + tl.arange(0, BM)
    n = tile % column_tiles * BN + tl.arange(0, BN)
    from_left, from_right = left + (m % M)[None, :], right + (n % N)[None, :]
    end = tl.load(ends + group)
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(tl.load(starts + group), end, BK):
        row = first + tl.arange(0, BK)
        live = row < end
        row_left, row_right = row, row
        if GATHER_LEFT or GATHER_RIGHT:
            token = tl.load(slot_of_row + row, mask=live, other=0) // TOP_K
            row_left, row_right = token if GATHER_LEFT else row, token if GATHER_RIGHT else row
        a = tl.load(from_left + row_left.to(tl.int64)[:, None] * stride_left, mask=live[:, None], other=0.0)
        b = tl.load(from_right + row_right.to(tl.int64)[:, None] * stride_right, mask=live[:, None], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
    place = out + group.to(tl.int64) * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _segment_sums_kernel(
    rows, weights, out, slot_of_row, starts, ends, N, stride_rows,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, WEIGHTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN columns of out[g] = sum of weight * row over the rows of g, in float32."""
    column_tiles = tl.cdiv(N, BN)
    group = tl.program_id(0) // column_tiles
    n = tl.program_id(0) % column_tiles * BN + tl.arange(0, BN)
    end = tl.load(ends + group)
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(tl.load(starts + group), end, BM):
        row = first + tl.arange(0, BM)
        live = row < end
        slot = row
        if GATHER:
            slot = tl.load(slot_of_row + row, mask=live, other=0)
        source = (slot // TOP_K).to(tl.int64)[:, None] * stride_rows + n[None, :]
        v = tl.load(rows + source, mask=live[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            v *= tl.load(weights + slot, mask=live, other=0.0).to(tl.float32)[:, None]
        acc += v
    tl.store(out + group.to(tl.int64) * N + n, tl.sum(acc, 0), mask=n < N)


def grouped_outer(
    left: Tensor,
    right: Tensor,
    starts: Tensor,
    ends: Tensor,
    tile: Tile,
    slot_of_row: Tensor | None = None,
    top_k: int = 1,
    gather_left: bool = False,
    gather_right: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """left[rows of g].T @ right[rows of g] for each group, rows starts[g] to ends[g] (int32 [G]): [G, M, N], 0 for
    groups without rows.

    left [R, M] and right [R, N] have one dtype; a gathered side is indexed by token: row r reads slot_of_row[r] //
    top_k. dtype is that of the result (float32 sums, rounded once); default: left's. For the other weight layout swap
    left and right.
    """
    (_, m), (_, n), groups = left.shape, right.shape, starts.shape[0]
    out = torch.empty((groups, m, n), dtype=dtype or left.dtype, device=left.device)
    if out.numel() == 0:
        return out
    left = left if left.stride(-1) == 1 else left.contiguous()
    right = right if right.stride(-1) == 1 else right.contiguous()
    _outer_kernel[(groups * triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),)](
        left, right, out, starts if slot_of_row is None else slot_of_row, starts, ends, m, n, left.stride(0),
        right.stride(0),
        TOP_K=top_k, GATHER_LEFT=gather_left, GATHER_RIGHT=gather_right,
        BM=tile.rows, BN=tile.columns, BK=tile.inner, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def segment_sums(
    rows: Tensor,
    starts: Tensor,
    ends: Tensor,
    weights: Tensor | None = None,
    slot_of_row: Tensor | None = None,
    top_k: int = 1,
) -> Tensor:
    """Sum of weight * row over the rows starts[g] to ends[g] of each group: float32 [G, N], 0 for groups without rows.

    rows [R, N] and weights [R] are indexed by row; with slot_of_row int32 [R], rows [T, N] by token and weights [T, k]
    by slot.
    """
    groups, n = starts.shape[0], rows.shape[1]
    out = torch.empty((groups, n), dtype=torch.float32, device=rows.device)
    if out.numel() == 0:
        return out
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    block = 128 if rows.is_cuda else 16
    _segment_sums_kernel[(groups * triton.cdiv(n, block),)](
        rows, rows if weights is None else weights.contiguous(), out, starts if slot_of_row is None else slot_of_row,
        starts, ends,
        n, rows.stride(0),
        TOP_K=top_k, GATHER=slot_of_row is not None, WEIGHTED=weights is not None, BM=32 if rows.is_cuda else 16,
        BN=block, num_warps=4,
    )  # fmt: skip
    return out
