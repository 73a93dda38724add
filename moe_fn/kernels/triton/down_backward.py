# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The gradient of the activated rows, pulled back through the router weight and the activation in the same kernel.

With a = activation(pre) and g the gradient of a row's token:

    d a'     = g @ down[e].T
    d weight = <d a', a> + <g, down_bias[e]>
    d pre    = activation'(pre) * weight * d a'

So the output rows of the forward pass are never needed (SonicMoE's trick),
nor is g copied.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fn.config import ActivationConfig
from moe_fn.kernels.triton.activation import act, act_backward
from moe_fn.kernels.triton.products import accumulate, parts, raster, tiles_side_by_side
from moe_fn.kernels.triton.slots import SortedSlots, TileMap
from moe_fn.kernels.triton.tiles import Tile


@triton.jit
def _store_piece(
    d, pre, d_pre, weighted, w, row, live, n, I, STORE_ACTIVATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """A piece of d a', [BM, BN] from column n on, rows from the tile's first: stores d pre and weight * a, returns <d
    a', a>, [BM].
    """
    GATED: tl.constexpr = ACTIVATION.gated
    c = n + tl.arange(0, BN)
    mask = live[:, None] & (c < I)[None, :]
    if GATED and INTERLEAVED:
        both = 2 * n + tl.arange(0, 2 * BN)
        place = row[:, None] * (2 * I) + both[None, :]
        in_range = live[:, None] & (both < 2 * I)[None, :]
        tile = tl.load(pre + place, mask=in_range, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(tile, (BM, BN, 2)))
    else:
        place = row[:, None] * (2 * I if GATED else I) + c[None, :]
        gate = tl.load(pre + place, mask=mask, other=0.0).to(tl.float32)
        up = gate
        if GATED:
            up = tl.load(pre + place + I, mask=mask, other=0.0).to(tl.float32)
    a = act(gate, up, ACTIVATION)
    dot = tl.sum(tl.where(mask, d * a, 0.0), 1)
    if STORE_ACTIVATED:
        tl.store(weighted + row[:, None] * I + c[None, :], (a * w[:, None]).to(weighted.dtype.element_ty), mask=mask)
    d_gate, d_up = act_backward(d * w[:, None], gate, up, ACTIVATION)
    if GATED and INTERLEAVED:
        tl.store(
            d_pre + place, tl.reshape(tl.join(d_gate, d_up), (BM, 2 * BN)).to(d_pre.dtype.element_ty), mask=in_range
        )
    else:
        tl.store(d_pre + place, d_gate.to(d_pre.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(d_pre + place + I, d_up.to(d_pre.dtype.element_ty), mask=mask)
    return dot


@triton.jit
def _down_backward_kernel(
    gradient, down, pre, weights, d_pre, weighted, partials, slot_of_row, starts, expert_of_tile, first_row_of_tile,
    row_tiles, H, I, stride_gradient, stride_expert, stride_in, stride_out, num_partials,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, STORE_ACTIVATED: tl.constexpr, EVEN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One tile of d a' and its epilogue, in PIECES of the columns one after the other: in one piece it spills 1.6 KB a
    thread.
    """
    GATED: tl.constexpr = ACTIVATION.gated
    row_tile, column_tile = raster(tl.program_id(0), row_tiles, tl.cdiv(I, BN), GROUP)
    expert = tl.load(expert_of_tile + row_tile)
    if expert < 0:
        return
    first = tl.load(first_row_of_tile + row_tile)
    row = tl.arange(0, BM)
    live = row < tl.load(starts + expert + 1) - first
    slot = tl.load(slot_of_row + first + tl.where(live, row, 0))
    n = column_tile * BN
    k = tl.arange(0, BK)
    wrapped = ((n + tl.arange(0, BN)) % I).to(tl.int64)
    left = gradient + (slot // TOP_K).to(tl.int64)[:, None] * stride_gradient + k[None, :]
    matrix = down + expert.to(tl.int64) * stride_expert
    right = matrix + k.to(tl.int64)[:, None] * stride_out + wrapped[None, :] * stride_in
    step = tl.full((), BK, tl.int64) * stride_out
    acc = accumulate(tl.zeros((BM, BN), tl.float32), left, right, H, BK, step, BK, EVEN)
    w = tl.full((BM,), 1.0, tl.float32)
    if WEIGHTED:
        w = tl.load(weights + slot)
    pre += first.to(tl.int64) * (2 * I if GATED else I)
    d_pre += first.to(tl.int64) * (2 * I if GATED else I)
    weighted += first.to(tl.int64) * I
    PIECE: tl.constexpr = BN // PIECES
    pieces = parts(acc, BM, BN, PIECES)
    dot = tl.zeros((BM,), tl.float32)
    for i in tl.static_range(PIECES):
        dot += _store_piece(
            pieces[i], pre, d_pre, weighted, w, row, live, n + i * PIECE, I, STORE_ACTIVATED, INTERLEAVED, BM, PIECE,
            ACTIVATION,
        )  # fmt: skip
    tl.store(partials + (first + row).to(tl.int64) * num_partials + column_tile, dot, mask=live)


@triton.jit
def _bias_dots_kernel(
    gradient, bias, partials, slot_of_row, starts, expert_of_tile, first_row_of_tile, H, stride_gradient, num_partials,
    TOP_K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The last partial of each row: <gradient of its token, bias of its expert>."""
    row_tile = tl.program_id(0)
    expert = tl.load(expert_of_tile + row_tile)
    if expert < 0:
        return
    first = tl.load(first_row_of_tile + row_tile)
    row = first + tl.arange(0, BM)
    live = row < tl.load(starts + expert + 1)
    token = tl.load(slot_of_row + tl.where(live, row, first)) // TOP_K
    k = tl.arange(0, BK)
    left = gradient + token.to(tl.int64)[:, None] * stride_gradient + k[None, :]
    right = bias + expert.to(tl.int64) * H + k
    acc = tl.zeros((BM, BK), tl.float32)
    for start in range(0, H, BK):
        g = tl.load(left + start, mask=(k < H - start)[None, :], other=0.0).to(tl.float32)
        acc += g * tl.load(right + start, mask=k < H - start, other=0.0).to(tl.float32)[None, :]
    tl.store(partials + row.to(tl.int64) * num_partials + num_partials - 1, tl.sum(acc, 1), mask=live)


@triton.jit
def _sum_partials_kernel(partials, row_of_slot, out, num_slots, num_partials, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """out[slot] = the sum of the partials of its row, 0 for slots of no expert."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_of_slot + slot, mask=slot < num_slots, other=-1)
    i = tl.arange(0, WIDTH)
    place = partials + row.to(tl.int64)[:, None] * num_partials + i[None, :]
    found = tl.load(place, mask=(row >= 0)[:, None] & (i < num_partials)[None, :], other=0.0)
    tl.store(out + slot, tl.sum(found, 1), mask=slot < num_slots)


def pieces_of(tile: Tile, interleaved: bool = False) -> int:
    """Parts of the columns that the epilogue takes one after the other: 32 bytes of a row at least; interleaved ones
    are twice as wide.
    """
    if tile.columns < 64:
        return 1
    return 8 if interleaved and tile.columns >= 128 else 4


def down_backward(
    gradient: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    pre: Tensor,
    weights: Tensor | None,
    slots: SortedSlots,
    tile_map: TileMap,
    activation: ActivationConfig,
    interleaved: bool,
    tile: Tile,
    store_activated: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient [T, H] of the output: (d_pre [R, N], weights * activated [R, I], d_weights [T, k] float32).

    down [E, I, H] by strides and its bias [E, H], as the down-projection got them; pre [R, N] as `up` kept it; weights
    [T, k] float32, None for ones. Rows of no expert are not written, d_weights of their slots are 0. Without
    store_activated the second is [0].
    """
    num_rows, (_, intermediate, hidden) = slots.slot_of_row.shape[0], down.shape
    pre = pre.contiguous()
    d_pre, weighted = torch.empty_like(pre), pre.new_empty((num_rows, intermediate) if store_activated else (0,))
    d_weights = torch.empty((gradient.shape[0], slots.top_k), dtype=torch.float32, device=pre.device)
    if num_rows == 0:
        return d_pre, weighted, d_weights
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    row_tiles, column_tiles = tile_map.expert_of_tile.shape[0], triton.cdiv(intermediate, tile.columns)
    num_partials = column_tiles + (down_bias is not None)
    partials = torch.empty((num_rows, num_partials), dtype=torch.float32, device=pre.device)
    of_rows = (slots.slot_of_row, slots.starts, tile_map.expert_of_tile, tile_map.first_row_of_tile)
    _down_backward_kernel[(row_tiles * column_tiles,)](
        gradient, down, pre, partials if weights is None else weights.contiguous(), d_pre, weighted, partials, *of_rows,
        row_tiles, hidden, intermediate, gradient.stride(0), *down.stride(), num_partials,
        TOP_K=slots.top_k, WEIGHTED=weights is not None, STORE_ACTIVATED=store_activated, EVEN=hidden % tile.inner == 0,
        INTERLEAVED=interleaved and activation.gated, GROUP=tiles_side_by_side(num_rows, down.shape[0], tile),
        ACTIVATION=activation,
        BM=tile.rows, BN=tile.columns, BK=tile.inner, PIECES=pieces_of(tile, interleaved and activation.gated),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if down_bias is not None:
        _bias_dots_kernel[(row_tiles,)](
            gradient, down_bias.contiguous(), partials, *of_rows, hidden, gradient.stride(0), num_partials,
            TOP_K=slots.top_k, BM=tile.rows, BK=tile.inner, num_warps=tile.warps,
        )  # fmt: skip
    width = triton.next_power_of_2(num_partials)
    block = max(1, 4096 // width)
    _sum_partials_kernel[(triton.cdiv(num_rows, block),)](
        partials, slots.row_of_slot, d_weights, num_rows, num_partials, BLOCK=block, WIDTH=width
    )
    return d_pre, weighted, d_weights
