# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Grouped products with quantized weights: functions that both of the layer's products share, and the down-projection.

A scale is applied in one of three places (QuantMatrix.place): to the weights before a product (inner), to the product
of a step (step), or to the sum (outer). Weights that are multiplied as floats are decoded in registers, and SWAP makes
them the left operand, which wgmma reads from registers: with 16 rows the matrix unit of sm_90, which needs at least 64
rows of the left operand, can be used too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fn.kernels.triton.products import raster, store_product, tiles_side_by_side
from moe_fn.kernels.triton.quant.codes import decode, nibbles, scale_value
from moe_fn.kernels.triton.quant.inputs import Rows
from moe_fn.kernels.triton.quant.matrix import QuantMatrix
from moe_fn.kernels.triton.quant.tiles import swaps
from moe_fn.kernels.triton.slots import TileMap
from moe_fn.kernels.triton.tiles import Tile, architecture_of


@triton.jit
def scale_row(columns, half_columns, half_rows, tile_out):
    """The row of the scale for each column of the matrix, for all granularities."""
    return columns // half_columns * half_rows + columns % half_columns // tile_out


@triton.jit
def _weights(
    q, scale, zero, start, in_tiles, SCHEME: tl.constexpr, PLACE: tl.constexpr, SCALE_FORM: tl.constexpr,
    TILE_IN: tl.constexpr,
    ZERO: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """float32 weights [BN, BK] of a step's codes, multiplied by inner scales."""
    middle = 8.0 if SCHEME == "int4" else 128.0
    if PLACE == "inner":
        GROUPS: tl.constexpr = BK // TILE_IN
        group = start // TILE_IN + tl.arange(0, GROUPS)
        s = scale_value(tl.load(scale[:, None] + group[None, :], mask=(group < in_tiles)[None, :], other=0), SCALE_FORM)
        if ZERO:
            middle = tl.load(zero[:, None] + group[None, :], mask=(group < in_tiles)[None, :], other=0).to(tl.float32)[
                :, :, None
            ]
        w = decode(tl.reshape(q, (BN, GROUPS, TILE_IN)), middle, SCHEME) * s[:, :, None]
        return tl.reshape(w, (BN, BK))
    if ZERO:
        middle = tl.load(zero + (start // TILE_IN if PLACE == "step" else 0)).to(tl.float32)[:, None]
    return decode(q, middle, SCHEME)


@triton.jit
def accumulate_codes(
    left, left_scale, right, scale, zero, length, in_tiles,
    SCHEME: tl.constexpr, PLACE: tl.constexpr, SCALE_FORM: tl.constexpr, TILE_IN: tl.constexpr, ZERO: tl.constexpr,
    LEFT: tl.constexpr, LEFT_GROUP: tl.constexpr, SWAP: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """left[BM, length] @ W[BN, length].T in float32 without outer scales, transposed if SWAP.

    left and right are pointers to the first step of each; scale and zero [BN] and left_scale [BM] to the first scales.
    LEFT: None for floats; otherwise the left operand has codes too, and codes are multiplied by codes.
    """
    CODES: tl.constexpr = 2 if SCHEME == "int4" or SCHEME == "e2m1" else 1
    STEP: tl.constexpr = PLACE == "step" or LEFT == "group"
    WHOLE: tl.constexpr = LEFT is not None and SCHEME == "int8"
    k, byte = tl.arange(0, BK), tl.arange(0, BK // CODES)
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.int32 if WHOLE and not STEP else tl.float32)
    for start in range(0, length, BK):
        if EVEN:
            a, q = tl.load(left), tl.load(right)
        else:
            a = tl.load(left, mask=(k < length - start)[None, :], other=0.0)
            q = tl.load(right, mask=(byte < (length - start) // CODES)[None, :], other=0.0)
        if LEFT is None:
            if CODES == 2:
                q = nibbles(q, BN, BK // CODES)
            w = _weights(q, scale, zero, start, in_tiles, SCHEME, PLACE, SCALE_FORM, TILE_IN, ZERO, BN, BK).to(a.dtype)
        else:
            w = q
        if STEP:
            d = _product(a, w, tl.zeros(acc.shape, tl.int32 if WHOLE else tl.float32), SWAP, None).to(tl.float32)
            if PLACE == "step":
                s = scale_value(tl.load(scale + start // TILE_IN), SCALE_FORM)
                d *= s[:, None] if SWAP else s[None, :]
            if LEFT == "group":
                s = tl.load(left_scale + start // LEFT_GROUP)
                d *= s[None, :] if SWAP else s[:, None]
            acc += d
        else:
            acc = _product(a, w, acc, SWAP, BK)
        left += BK
        right += BK // CODES
    return acc.to(tl.float32)


@triton.jit
def _product(a, w, acc, SWAP: tl.constexpr, SHORT: tl.constexpr):
    """acc + a @ w.T, transposed if SWAP; SHORT: the number of fp8 products that sm_90 may sum with 14 bits before they
    are added to the float32 sum.
    """
    if SWAP:
        return tl.dot(w, tl.trans(a), acc, input_precision="ieee", max_num_imprecise_acc=SHORT, out_dtype=acc.dtype)
    else:
        return tl.dot(a, tl.trans(w), acc, input_precision="ieee", max_num_imprecise_acc=SHORT, out_dtype=acc.dtype)


@triton.jit
def finished(
    acc, row_scale, expert_scale, live, scale, factor, half,
    PLACE: tl.constexpr, SCALE_FORM: tl.constexpr, GLOBAL: tl.constexpr, LEFT: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """The sum times its outer scales, [BM, BN]."""
    if SWAP:
        acc = tl.trans(acc)
    if PLACE == "outer":
        acc *= scale_value(tl.load(scale), SCALE_FORM)[None, :]
    if GLOBAL:
        acc *= tl.load(factor + half)[None, :]
    if LEFT == "row":
        acc *= tl.load(row_scale, mask=live, other=0.0)[:, None]
    if LEFT == "expert":
        acc *= tl.load(expert_scale)
    return acc


@triton.jit
def _product_kernel(
    rows, left_scale, payload, scale, zero, factor, bias, out, ends, expert_of_tile, first_row_of_tile,
    row_tiles, K, N, half_columns, half_rows, tile_out, in_tiles, left_groups,
    SCHEME: tl.constexpr, PLACE: tl.constexpr, SCALE_FORM: tl.constexpr, TILE_IN: tl.constexpr, ZERO: tl.constexpr,
    GLOBAL: tl.constexpr, LEFT: tl.constexpr, LEFT_GROUP: tl.constexpr, SWAP: tl.constexpr,
    BIAS: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[r] = rows[r] @ W[expert of r].T + bias; one tile per program, unused tiles return."""
    CODES: tl.constexpr = 2 if SCHEME == "int4" or SCHEME == "e2m1" else 1
    row_tile, column_tile = raster(tl.program_id(0), row_tiles, tl.cdiv(N, BN), GROUP)
    expert = tl.load(expert_of_tile + row_tile)
    if expert < 0:
        return
    first = tl.load(first_row_of_tile + row_tile)
    row = tl.arange(0, BM)
    live = row < tl.load(ends + expert) - first
    expert = expert.to(tl.int64)
    source = first.to(tl.int64) + tl.where(live, row, 0)
    n = (column_tile * BN + tl.arange(0, BN)) % N
    k, byte = tl.arange(0, BK), tl.arange(0, BK // CODES)
    place = (expert * (N // half_columns * half_rows) + scale_row(n, half_columns, half_rows, tile_out)) * in_tiles
    left = rows + source[:, None] * K + k[None, :]
    right = payload + (expert * N + n)[:, None] * (K // CODES) + byte[None, :]
    acc = accumulate_codes(
        left, left_scale + source * left_groups, right, scale + place, zero + place, K, in_tiles,
        SCHEME, PLACE, SCALE_FORM, TILE_IN, ZERO, LEFT, LEFT_GROUP, SWAP, EVEN, BM, BN, BK,
    )  # fmt: skip
    acc = finished(
        acc, left_scale + source, left_scale + expert, live, scale + place, factor + expert * (N // half_columns),
        n // half_columns,
        PLACE, SCALE_FORM, GLOBAL, LEFT, SWAP,
    )  # fmt: skip
    store_product(acc, bias, out, expert, first, row, live, column_tile * BN, N, BIAS, BN)


def quantized_product(
    rows: Rows,
    matrix: QuantMatrix,
    ends: Tensor,
    tile_map: TileMap,
    tile: Tile,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    zero_rest: bool = False,
) -> Tensor:
    """rows[r] @ W[e].T + bias[e] for the expert e of row r: rows [R, K] to [R, N] in dtype; rows without an expert are
    not written, or 0 with zero_rest.

    ends int32 [E] are the ends of each expert's rows; tile_map has their first rows. tile.inner is compatible with the
    scales (quant.tiles.fitting_step).
    """
    experts, columns, inner = matrix.shape
    new = rows.values.new_zeros if zero_rest else rows.values.new_empty
    out = new((rows.values.shape[0], columns), dtype=dtype)
    if out.numel() == 0:
        return out
    row_tiles = tile_map.expert_of_tile.shape[0]
    scale, zero, factor, *sizes = matrix.arguments()
    _product_kernel[(row_tiles * triton.cdiv(columns, tile.columns),)](
        rows.values, rows.scale_or(scale), rows.payload_of(matrix, architecture_of(out.device)), scale, zero, factor,
        scale if bias is None else bias.contiguous(), out,
        ends, tile_map.expert_of_tile, tile_map.first_row_of_tile, row_tiles, inner, columns, *sizes, rows.groups,
        **matrix.constants(tile.inner), **rows.constants(), SWAP=swaps(tile, rows.values.element_size()),
        BIAS=bias is not None,
        EVEN=inner % tile.inner == 0, GROUP=tiles_side_by_side(out.shape[0], experts, tile),
        BM=tile.rows, BN=tile.columns, BK=tile.inner, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
