# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Combine: sums the rows of each token's slots, weighted in the forward pass, unweighted in the gradient of x."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# At most so many loads (16 bytes per thread each) are in flight; more would need too many registers.
UNROLLED_SLOTS = 16
ELEMENTS = 1024  # per program with 4 warps: 8 per thread, one load of 16 bytes for 16-bit types


@triton.jit
def _gather_sum_kernel(
    rows, row_of_slot, weights, out, T, H, stride_row,
    TOP_K: tl.constexpr, UNROLL: tl.constexpr, WEIGHTED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over j of weights[t, j] * rows[row_of_slot[t, j]], in the order of j; slots of -1 are not read."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    h = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    if UNROLL:
        for j in tl.static_range(TOP_K):
            total += _slot(rows, row_of_slot, weights, t, h, j, T, H, stride_row, TOP_K, WEIGHTED)
    else:
        for j in tl.range(TOP_K):
            total += _slot(rows, row_of_slot, weights, t, h, j, T, H, stride_row, TOP_K, WEIGHTED)
    mask = (t < T)[:, None] & (h < H)[None, :]
    tl.store(out + t.to(tl.int64)[:, None] * H + h[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _slot(rows, row_of_slot, weights, t, h, j, T, H, stride_row, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr):
    """The float32 contribution of choice j to the tokens t."""
    slot = t.to(tl.int64) * TOP_K + j
    row = tl.load(row_of_slot + slot, mask=t < T, other=-1)
    mask = (row >= 0)[:, None] & (h < H)[None, :]
    values = tl.load(rows + row.to(tl.int64)[:, None] * stride_row + h[None, :], mask=mask, other=0.0).to(tl.float32)
    if WEIGHTED:
        values *= tl.load(weights + slot, mask=row >= 0, other=0.0)[:, None]
    return values


def gather_sum(rows: Tensor, row_of_slot: Tensor, weights: Tensor | None, top_k: int, dtype: torch.dtype) -> Tensor:
    """y[t] = sum over j of weights[t, j] * rows[row_of_slot[t * top_k + j]] without slots of -1: [R, H] to [T, H] in
    dtype.

    row_of_slot is [T * top_k] int32; weights [T, top_k] float32, or None for ones. The sum is computed in float32 in
    the order of j and rounded once.
    """
    num_tokens, hidden = row_of_slot.shape[0] // top_k, rows.shape[1]
    out = rows.new_empty((num_tokens, hidden), dtype=dtype)
    if out.numel() == 0:
        return out
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    columns = min(ELEMENTS, max(16, triton.next_power_of_2(hidden)))
    tokens = min(ELEMENTS // columns, 16)
    _gather_sum_kernel[(triton.cdiv(num_tokens, tokens), triton.cdiv(hidden, columns))](
        rows, row_of_slot.contiguous(), None if weights is None else weights.contiguous(), out, num_tokens, hidden,
        rows.stride(0),
        TOP_K=top_k, UNROLL=top_k <= UNROLLED_SLOTS, WEIGHTED=weights is not None, TOKENS=tokens, COLUMNS=columns,
        num_warps=4,
    )  # fmt: skip
    return out
