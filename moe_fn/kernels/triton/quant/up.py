# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The up-projection with weights in codes; its activated rows are stored as floats, or in codes if a tile holds whole
groups of them.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fn.config import ActivationConfig
from moe_fn.kernels.triton.activation import act
from moe_fn.kernels.triton.products import parts, raster, tiles_side_by_side
from moe_fn.kernels.triton.quant.inputs import MOST, Rows, code, scale_of
from moe_fn.kernels.triton.quant.matrix import QuantMatrix
from moe_fn.kernels.triton.quant.products import accumulate_codes, finished, scale_row
from moe_fn.kernels.triton.quant.tiles import swaps
from moe_fn.kernels.triton.slots import SortedSlots, TileMap
from moe_fn.kernels.triton.tiles import Tile, architecture_of
from moe_fn.kernels.triton.up import gate_and_up, pieces_of, store_piece, weight_columns

ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _store_codes(
    tile, bias, activated, out_scale, row, live, n, I, left_groups,
    BIAS: tl.constexpr, INTERLEAVED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FORM: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    MOST: tl.constexpr, AS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Stores the activated tile in codes; "group": with the scale of its columns, one for each row, "expert": by a
    scale that is given.
    """
    GATED: tl.constexpr = ACTIVATION.gated
    COLUMNS: tl.constexpr = BN // 2 if GATED else BN
    c = n + tl.arange(0, COLUMNS)
    gate, up = gate_and_up(tile, bias, bias, row, live, n, I, BIAS, False, INTERLEAVED, GATED, BM, BN)
    value = act(gate, up, ACTIVATION)
    value = value.to(AS).to(tl.float32)  # as if it had been stored
    mask = live[:, None] & (c < I)[None, :]
    if FORM == "group":
        s = scale_of(tl.max(tl.where((c < I)[None, :], tl.abs(value), 0.0), 1), FORM, POWER_OF_TWO, MOST)
        tl.store(out_scale + row * left_groups + n // COLUMNS, s, mask=live)
        value = code(value, s[:, None], MOST)
    else:
        value = code(value, tl.load(out_scale), MOST)
    tl.store(activated + row[:, None] * I + c[None, :], value.to(activated.dtype.element_ty), mask=mask)


@triton.jit
def _up_kernel(
    x, left_scale, payload, scale, zero, factor, bias, activated, pre, out_scale,
    slot_of_row, starts, expert_of_tile, first_row_of_tile,
    row_tiles, H, I, half_columns, half_rows, tile_out, in_tiles, left_groups, out_groups,
    SCHEME: tl.constexpr, PLACE: tl.constexpr, SCALE_FORM: tl.constexpr, TILE_IN: tl.constexpr, ZERO: tl.constexpr,
    GLOBAL: tl.constexpr, LEFT: tl.constexpr, LEFT_GROUP: tl.constexpr, SWAP: tl.constexpr,
    TOP_K: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, EVEN: tl.constexpr, INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    OUT_FORM: tl.constexpr, POWER_OF_TWO: tl.constexpr, MOST: tl.constexpr, AS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PIECES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """activated[r] = activation(x[token of r] @ W[e].T + bias[e]); with LEFT == "expert" x is by row, not by token."""
    CODES: tl.constexpr = 2 if SCHEME == "int4" or SCHEME == "e2m1" else 1
    GATED: tl.constexpr = ACTIVATION.gated
    WIDTH: tl.constexpr = 2 if GATED else 1
    PIECE: tl.constexpr = BN // PIECES
    row_tile, column_tile = raster(tl.program_id(0), row_tiles, tl.cdiv(I, BN // WIDTH), GROUP)
    expert = tl.load(expert_of_tile + row_tile)
    if expert < 0:
        return
    first = tl.load(first_row_of_tile + row_tile).to(tl.int64)
    row = tl.arange(0, BM)
    live = row < tl.load(starts + expert + 1) - first
    expert = expert.to(tl.int64)
    source = first + tl.where(live, row, 0)
    if LEFT != "expert":
        source = (tl.load(slot_of_row + source) // TOP_K).to(tl.int64)
    n = column_tile * (BN // WIDTH)
    columns = weight_columns(n, I, GATED, INTERLEAVED, BN, PIECE, VECTOR)
    k, byte = tl.arange(0, BK), tl.arange(0, BK // CODES)
    place = (
        expert * (WIDTH * I // half_columns * half_rows) + scale_row(columns, half_columns, half_rows, tile_out)
    ) * in_tiles
    acc = accumulate_codes(
        x + source[:, None] * H + k[None, :], left_scale + source * left_groups,
        payload + (expert * (WIDTH * I) + columns)[:, None] * (H // CODES) + byte[None, :], scale + place, zero + place,
        H, in_tiles,
        SCHEME, PLACE, SCALE_FORM, TILE_IN, ZERO, LEFT, LEFT_GROUP, SWAP, EVEN, BM, BN, BK,
    )  # fmt: skip
    acc = finished(
        acc, left_scale + source, left_scale + expert, live, scale + place,
        factor + expert * (WIDTH * I // half_columns),
        columns // half_columns, PLACE, SCALE_FORM, GLOBAL, LEFT, SWAP,
    )  # fmt: skip
    bias += expert * (WIDTH * I)
    activated += first * I
    if OUT_FORM is not None:
        _store_codes(
            acc, bias, activated, out_scale + (expert if OUT_FORM == "expert" else first * out_groups), row, live, n, I,
            out_groups,
            BIAS, INTERLEAVED, BM, BN, OUT_FORM, POWER_OF_TWO, MOST, AS,
            ACTIVATION,
        )  # fmt: skip
    else:
        pre += first * (WIDTH * I)
        pieces = parts(acc, BM, BN, PIECES)
        for i in tl.static_range(PIECES):
            store_piece(
                pieces[i], bias, activated, pre, row, live, n + i * (PIECE // WIDTH), I, BIAS, KEEP, INTERLEAVED, BM,
                PIECE,
                ACTIVATION,
            )  # fmt: skip


@dataclass(frozen=True)
class Store:
    """How activated rows are stored in codes: each group of a row with a scale that is computed, or by the scale of its
    expert, [E].
    """

    dtype: torch.dtype
    form: Literal["group", "expert"]
    scale: Tensor | None = None
    power_of_two: bool = False


def quantized_up(
    rows: Rows,
    slots: SortedSlots,
    tile_map: TileMap,
    matrix: QuantMatrix,
    gate_up_bias: Tensor | None,
    activation: ActivationConfig,
    interleaved: bool,
    keep: bool,
    tile: Tile,
    dtype: torch.dtype,
    store: Store | None = None,
) -> tuple[Rows, Tensor]:
    """activation(x @ W[e].T + bias[e]) for each row of an expert: (activated [R, I], pre [R, N] in dtype; pre is [0]
    unless kept).

    rows: the tokens [T, H], or with scales of experts the rows [R, H] sorted by expert. Activated rows are in dtype, or
    in codes with `store`, whose groups are as wide as a tile's activated columns; codes and `keep` exclude each other.
    Rows of no expert are not written.
    """
    _, columns, hidden = matrix.shape
    num_rows, width = slots.slot_of_row.shape[0], activation.gate_up_parts
    intermediate, activated_columns = columns // width, tile.columns // width
    activated = rows.values.new_empty((num_rows, intermediate), dtype=dtype if store is None else store.dtype)
    pre = rows.values.new_empty((num_rows, columns) if keep else (0,), dtype=dtype)
    out_groups = triton.cdiv(intermediate, activated_columns)
    out_scale = None if store is None else store.scale
    if store is not None and store.form == "group":
        out_scale = rows.values.new_empty((num_rows, out_groups), dtype=torch.float32)
    if num_rows > 0:
        row_tiles = tile_map.expert_of_tile.shape[0]
        scale, zero, factor, *sizes = matrix.arguments()
        _up_kernel[(row_tiles * out_groups,)](
            rows.values, rows.scale_or(scale), rows.payload_of(matrix, architecture_of(pre.device)), scale, zero,
            factor,
            scale if gate_up_bias is None else gate_up_bias.contiguous(), activated, pre,
            scale if out_scale is None else out_scale,
            slots.slot_of_row, slots.starts, tile_map.expert_of_tile, tile_map.first_row_of_tile,
            row_tiles, hidden, intermediate, *sizes, rows.groups, out_groups,
            **matrix.constants(tile.inner), **rows.constants(), SWAP=swaps(tile, rows.values.element_size()),
            TOP_K=slots.top_k, BIAS=gate_up_bias is not None, KEEP=keep, EVEN=hidden % tile.inner == 0,
            INTERLEAVED=interleaved and activation.gated, GROUP=tiles_side_by_side(num_rows, matrix.shape[0], tile),
            **store_arguments(store, dtype), ACTIVATION=activation,
            BM=tile.rows, BN=tile.columns, BK=tile.inner, PIECES=1 if store else pieces_of(tile, activation.gated),
            VECTOR=math.gcd(intermediate, 16), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return Rows(
        values=activated, scale=out_scale, form=None if store is None else store.form, group=activated_columns
    ), pre


def store_arguments(store: Store | None, dtype: torch.dtype) -> dict[str, Any]:
    """The constexpr arguments of the epilogue."""
    if store is None:
        return {"OUT_FORM": None, "POWER_OF_TWO": False, "MOST": 0.0, "AS": ELEMENTS[dtype]}
    return {
        "OUT_FORM": store.form,
        "POWER_OF_TWO": store.power_of_two,
        "MOST": MOST[store.dtype],
        "AS": ELEMENTS[dtype],
    }
