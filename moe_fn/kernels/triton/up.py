# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The up-projection: gathers the tokens' rows, multiplies, adds the bias and applies the activation; one kernel.

Gate and up columns of a tile are computed by ONE dot (half of the tile's columns are gates) and are parted in
registers: two dots for two accumulators spill on sm_80 (3.8 KB a thread), and two into one accumulator are miscompiled
on sm_103 (Triton #10821).
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from moe_fn.config import ActivationConfig
from moe_fn.kernels.triton.activation import act
from moe_fn.kernels.triton.products import accumulate, halves, parts, raster, tiles_side_by_side
from moe_fn.kernels.triton.slots import SortedSlots, TileMap
from moe_fn.kernels.triton.tiles import Tile


@triton.jit
def weight_columns(
    first, I, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, BN: tl.constexpr, PIECE: tl.constexpr,
    VECTOR: tl.constexpr
):  # fmt: skip
    """Columns of the weights that make the activated columns from `first` on: in every piece gates, then ups, if they
    are packed.
    """
    c = tl.arange(0, BN)
    if not GATED:
        return (first + c) % I
    if INTERLEAVED:
        return (2 * first + c) % (2 * I)
    HALF: tl.constexpr = PIECE // 2
    columns = (first + c // PIECE * HALF + c % HALF) % I + c % PIECE // HALF * I
    # the compiler forgets it at the `%`, and would load weights one by one
    SURE: tl.constexpr = VECTOR if VECTOR < HALF else HALF
    return tl.max_contiguous(tl.multiple_of(columns, SURE), SURE)


@triton.jit
def gate_and_up(
    tile, bias, pre, row, live, n, I,
    BIAS: tl.constexpr, KEEP: tl.constexpr, INTERLEAVED: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """What the activation gets of a piece of the product, [BM, BN], whose activated columns begin at n; stored in pre
    if KEEP.
    """
    WIDTH: tl.constexpr = 2 if GATED else 1
    if GATED and not INTERLEAVED:
        c = n + tl.arange(0, BN // WIDTH)
        gate, up = halves(tile, BM, BN)
        if BIAS:
            gate += tl.load(bias + c, mask=c < I, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias + I + c, mask=c < I, other=0.0).to(tl.float32)[None, :]
        if KEEP:
            place = row[:, None] * (WIDTH * I) + c[None, :]
            mask = live[:, None] & (c < I)[None, :]
            tl.store(pre + place, gate.to(pre.dtype.element_ty), mask=mask)
            tl.store(pre + I + place, up.to(pre.dtype.element_ty), mask=mask)
    else:  # the piece's columns are neighbours
        both = WIDTH * n + tl.arange(0, BN)
        inside = both < WIDTH * I
        if BIAS:
            tile += tl.load(bias + both, mask=inside, other=0.0).to(tl.float32)[None, :]
        if KEEP:
            all_places = row[:, None] * (WIDTH * I) + both[None, :]
            tl.store(pre + all_places, tile.to(pre.dtype.element_ty), mask=live[:, None] & inside[None, :])
        gate, up = tile, tile
        if GATED:
            gate, up = tl.split(tl.reshape(tile, (BM, BN // 2, 2)))
    return gate, up


@triton.jit
def store_piece(
    tile, bias, activated, pre, row, live, n, I,
    BIAS: tl.constexpr, KEEP: tl.constexpr, INTERLEAVED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Stores a piece of the product, [BM, BN], and its activation, which begins at column n; rows count from the tile's
    first one.
    """
    GATED: tl.constexpr = ACTIVATION.gated
    c = n + tl.arange(0, BN // 2 if GATED else BN)
    gate, up = gate_and_up(tile, bias, pre, row, live, n, I, BIAS, KEEP, INTERLEAVED, GATED, BM, BN)
    value = act(gate, up, ACTIVATION)
    mask = live[:, None] & (c < I)[None, :]
    tl.store(activated + row[:, None] * I + c[None, :], value.to(activated.dtype.element_ty), mask=mask)


@triton.jit
def _up_kernel(
    x, weight, bias, activated, pre, slot_of_row, starts, expert_of_tile, first_row_of_tile,
    row_tiles, H, I, stride_x, stride_expert, stride_in, stride_out,
    TOP_K: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, EVEN: tl.constexpr, INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PIECES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """activated[r] = activation(x[token of r] @ weight[e] + bias[e]); KEEP: pre[r] is what the activation got."""
    GATED: tl.constexpr = ACTIVATION.gated
    WIDTH: tl.constexpr = 2 if GATED else 1
    PIECE: tl.constexpr = BN // PIECES
    row_tile, column_tile = raster(tl.program_id(0), row_tiles, tl.cdiv(I, BN // WIDTH), GROUP)
    expert = tl.load(expert_of_tile + row_tile)
    if expert < 0:
        return
    first = tl.load(first_row_of_tile + row_tile)
    row = tl.arange(0, BM)
    live = row < tl.load(starts + expert + 1) - first
    token = tl.load(slot_of_row + first + tl.where(live, row, 0)) // TOP_K
    k = tl.arange(0, BK)
    n = column_tile * (BN // WIDTH)
    columns = weight_columns(n, I, GATED, INTERLEAVED, BN, PIECE, VECTOR)
    left = x + token.to(tl.int64)[:, None] * stride_x + k[None, :]
    matrix = weight + expert.to(tl.int64) * stride_expert
    right = matrix + k.to(tl.int64)[:, None] * stride_in + columns.to(tl.int64)[None, :] * stride_out
    step = tl.full((), BK, tl.int64) * stride_in
    acc = accumulate(tl.zeros((BM, BN), tl.float32), left, right, H, BK, step, BK, EVEN)
    bias += expert.to(tl.int64) * (WIDTH * I)
    activated += first.to(tl.int64) * I
    pre += first.to(tl.int64) * (WIDTH * I)
    pieces = parts(acc, BM, BN, PIECES)
    for i in tl.static_range(PIECES):
        store_piece(
            pieces[i], bias, activated, pre, row, live, n + i * (PIECE // WIDTH), I, BIAS, KEEP, INTERLEAVED, BM, PIECE,
            ACTIVATION,
        )  # fmt: skip


def pieces_of(tile: Tile, gated: bool = True) -> int:
    """Parts of the columns that the epilogue takes one after the other: all 256 at once spill (up to 648 bytes a thread
    on sm_90).
    """
    return (4 if gated else 8) if tile.columns >= 256 else 1


def up(
    x: Tensor,
    slots: SortedSlots,
    tile_map: TileMap,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    activation: ActivationConfig,
    interleaved: bool,
    keep: bool,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """activation(x @ gate_up[e] + bias[e]) for each row of an expert: (activated [R, I], pre [R, N]; pre is [0] unless
    kept).

    x [T, H]; gate_up [E, H, N] by strides (the `.mT` of weights laid out [E, out, in]), bias [E, N]. Both results are
    in the dtype of x; the columns of pre are laid out as the weights' are. Rows of no expert are not written.
    """
    num_rows, hidden, columns = slots.slot_of_row.shape[0], x.shape[1], gate_up.shape[-1]
    intermediate = columns // activation.gate_up_parts
    activated = x.new_empty((num_rows, intermediate))
    pre = x.new_empty((num_rows, columns) if keep else (0,))
    if num_rows == 0:
        return activated, pre
    x = x if x.stride(-1) == 1 else x.contiguous()
    bias = gate_up if gate_up_bias is None else gate_up_bias.contiguous()
    row_tiles = tile_map.expert_of_tile.shape[0]
    activated_columns = tile.columns // activation.gate_up_parts
    _up_kernel[(row_tiles * triton.cdiv(intermediate, activated_columns),)](
        x, gate_up, bias, activated, pre, slots.slot_of_row, slots.starts,
        tile_map.expert_of_tile, tile_map.first_row_of_tile, row_tiles, hidden, intermediate, x.stride(0),
        *gate_up.stride(),
        TOP_K=slots.top_k, BIAS=gate_up_bias is not None, KEEP=keep, EVEN=hidden % tile.inner == 0,
        INTERLEAVED=interleaved and activation.gated, GROUP=tiles_side_by_side(num_rows, gate_up.shape[0], tile),
        ACTIVATION=activation,
        BM=tile.rows, BN=tile.columns, BK=tile.inner, PIECES=pieces_of(tile, activation.gated),
        VECTOR=math.gcd(intermediate, 16),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return activated, pre
