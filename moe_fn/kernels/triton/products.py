# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Grouped products, [rows of a group] @ [K, N]: the down-projection, the gradient of x, and functions that all products
share.

One program computes one tile of rows x columns of one group. Loads use pointers: they work on every target and for
every alignment, and the compiler pipelines them (cp.async on NVIDIA). A tile's columns wrap around at N instead of
being masked: columns past the end compute a copy of the first ones and are not stored, so the loads of the inner loop
have no mask if `inner` divides K.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fn.kernels.triton.slots import TileMap
from moe_fn.kernels.triton.tiles import Tile


@triton.jit
def raster(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles iterate over the columns together, which reuses weights in
    L2.
    """
    together = GROUP * column_tiles
    first = program // together * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    return first + program % together % size, program % together // size


@triton.jit
def accumulate(acc, left, right, length, left_step, right_step, BK: tl.constexpr, EVEN: tl.constexpr):
    """acc + left[BM, length] @ right[length, BN] in float32; left and right are pointers to the first BK of each, and
    advance by the steps.
    """
    k = tl.arange(0, BK)
    for start in range(0, length, BK):
        if EVEN:
            a, b = tl.load(left), tl.load(right)
        else:  # mask both sides: memory past the end may be NaN
            a = tl.load(left, mask=(k < length - start)[None, :], other=0.0)
            b = tl.load(right, mask=(k < length - start)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        left += left_step
        right += right_step
    return acc


@triton.jit
def halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of a tile's columns, [BM, BN / 2] each."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def parts(tile, BM: tl.constexpr, BN: tl.constexpr, PIECES: tl.constexpr):
    """A tile's columns as a tuple of 1, 2, 4 or 8 pieces, left to right: an epilogue that processes them one by one
    needs fewer registers.
    """
    pieces = (tile,)
    for level in tl.static_range(3):
        if 1 << level < PIECES:
            finer = ()
            for i in tl.static_range(1 << level):
                finer += halves(pieces[i], BM, BN // (1 << level))
            pieces = finer  # type: ignore[assignment]
    return pieces


@triton.jit
def store_product(acc, bias, out, group, first, row, live, column, N, BIAS: tl.constexpr, BN: tl.constexpr):
    """Stores a tile plus the bias of its group at the columns from `column` on; `row` is relative to `first`, the
    tile's first row.
    """
    out += first.to(tl.int64) * N  # offsets within a tile fit 32 bits; 64-bit pointers would take half of the registers
    c = column + tl.arange(0, BN)
    if BIAS:
        acc += tl.load(bias + group.to(tl.int64) * N + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * N + c[None, :], acc.to(out.dtype.element_ty), mask=live[:, None] & (c < N)[None, :])


@triton.jit
def _product_kernel(
    rows, weight, bias, out, slot_of_row, ends, group_of_tile, first_row_of_tile, weight_of_group,
    row_tiles, K, N, stride_rows, stride_group, stride_in, stride_out,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, BIAS: tl.constexpr, INDIRECT: tl.constexpr, EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[r] = rows[r or its token] @ weight[group of r] + bias[group of r]; one tile per program, unused tiles
    return.
    """
    row_tile, column_tile = raster(tl.program_id(0), row_tiles, tl.cdiv(N, BN), GROUP)
    group = tl.load(group_of_tile + row_tile)
    if group < 0:
        return
    first = tl.load(first_row_of_tile + row_tile)
    row = tl.arange(0, BM)
    live = row < tl.load(ends + group) - first
    if INDIRECT:
        group = tl.load(weight_of_group + group)
    source = first + tl.where(live, row, 0)
    if GATHER:
        source = tl.load(slot_of_row + source) // TOP_K
    k = tl.arange(0, BK)
    left = rows + source.to(tl.int64)[:, None] * stride_rows + k[None, :]
    n = ((column_tile * BN + tl.arange(0, BN)) % N).to(tl.int64)
    right = weight + group.to(tl.int64) * stride_group + k.to(tl.int64)[:, None] * stride_in + n[None, :] * stride_out
    step = tl.full((), BK, tl.int64) * stride_in
    acc = accumulate(tl.zeros((BM, BN), tl.float32), left, right, K, BK, step, BK, EVEN)
    store_product(acc, bias, out, group, first, row, live, column_tile * BN, N, BIAS, BN)


def tiles_side_by_side(num_rows: int, num_groups: int, tile: Tile) -> int:
    """GROUP of the raster: 8 if groups have at least two row tiles on average, else 1, as no weights are read twice."""
    return 8 if num_rows >= 2 * tile.rows * num_groups else 1


def grouped_product(
    rows: Tensor,
    weight: Tensor,
    ends: Tensor,
    tile_map: TileMap,
    tile: Tile,
    bias: Tensor | None = None,
    slot_of_row: Tensor | None = None,
    top_k: int = 1,
    weight_of_group: Tensor | None = None,
    zero_rest: bool = False,
) -> Tensor:
    """rows [R, K] @ weight [G, K, N] (any strides) + bias [G, N], each row by its group: [R, N] in the dtype of rows.

    The rows of group g end before ends[g] (int32 [G]); tile_map has their first rows. With slot_of_row int32 [R], row r
    reads rows[slot_of_row[r] // top_k]. Rows without a group are not written, or 0 with zero_rest.
    """
    num_rows = rows.shape[0] if slot_of_row is None else slot_of_row.shape[0]
    inner, columns = weight.shape[-2:]
    out = (torch.zeros if zero_rest else torch.empty)((num_rows, columns), dtype=rows.dtype, device=rows.device)
    if out.numel() == 0 or weight.shape[0] == 0:
        return out
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    bias = bias if bias is None else bias.contiguous()
    row_tiles = tile_map.expert_of_tile.shape[0]
    _product_kernel[(row_tiles * triton.cdiv(columns, tile.columns),)](
        rows, weight, weight if bias is None else bias, out,
        ends if slot_of_row is None else slot_of_row, ends, tile_map.expert_of_tile, tile_map.first_row_of_tile,
        ends if weight_of_group is None else weight_of_group,
        row_tiles, inner, columns, rows.stride(0), *weight.stride(),
        TOP_K=top_k, GATHER=slot_of_row is not None, BIAS=bias is not None, INDIRECT=weight_of_group is not None,
        EVEN=inner % tile.inner == 0, GROUP=tiles_side_by_side(num_rows, ends.shape[0], tile),
        BM=tile.rows, BN=tile.columns, BK=tile.inner, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
