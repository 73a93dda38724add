"""The forward pass of quantized experts: dispatch, products and combine. Weights are decoded in the products, or codes
are multiplied by codes.

    weights only       sort -> up -> down -> combine, as in moe_fn.kernels.triton.layer
    scales of tokens   sort, quantize x -> up -> quantize activated rows -> down -> combine
    scales of groups   sort, quantize x -> up, which stores codes if a tile has whole groups -> down -> combine
    scales of experts  sort -> quantize rows -> up, which stores codes -> down -> combine

x is quantized once for each token and not for each slot, unless experts have separate scales.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fn.config import ActivationConfig, ActivationQuantConfig
from moe_fn.kernels.triton.combine import gather_sum
from moe_fn.kernels.triton.metadata import sort_for_tiles
from moe_fn.kernels.triton.quant.inputs import Rows, quantize_by_expert, quantize_rows
from moe_fn.kernels.triton.quant.matrix import QuantMatrix
from moe_fn.kernels.triton.quant.products import quantized_product
from moe_fn.kernels.triton.quant.tiles import coded_tile
from moe_fn.kernels.triton.quant.up import Store, quantized_up
from moe_fn.kernels.triton.slots import SortedSlots
from moe_fn.kernels.triton.tiles import Tile, architecture_of, rows_of_tiles

CODES = {"fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True, kw_only=True)
class QuantProblem:
    """The layer's arguments: x [T, H], expert_ids and float32 expert_weights [T, k], and a quantization that
    `quant_problem` accepts.
    """

    x: Tensor
    expert_ids: Tensor
    expert_weights: Tensor
    gate_up: QuantMatrix
    down: QuantMatrix
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: ActivationConfig
    interleaved: bool
    invariant: bool = False  # whether a token's result is bitwise independent of the other tokens
    rounding: ActivationQuantConfig | None = None  # of activations
    gate_up_input_scale: Tensor | None = None  # [E] float32
    down_input_scale: Tensor | None = None

    def tile(self, kind: str, matrix: QuantMatrix) -> Tile:
        """The tile of a product, "up" or "product" (down)."""
        experts, columns, inner = matrix.shape
        a = self.rounding
        group = () if a is None or a.group_size is None or a.group_size >= inner else (a.group_size,)
        kind, width = (f"decoded_{kind}", self.x.element_size()) if a is None else (f"coded_{kind}", 1)
        rows = rows_of_tiles(self.expert_ids.numel(), experts, self.invariant)
        sizes = rows, experts, columns, matrix.payload.shape[2]
        return coded_tile(kind, *sizes, matrix.shared + group, width, architecture_of(self.x.device))


def forward(problem: QuantProblem, keep: bool) -> tuple[Tensor, Tensor]:
    """Returns (y [T, H], pre-activations [R, N] in the order of the rows, or [0] without keep)."""
    p, dtype = problem, problem.x.dtype
    first, second = p.tile("up", p.gate_up), p.tile("product", p.down)
    slots, maps = sort_for_tiles(p.expert_ids, p.gate_up.shape[0], first, second)
    tokens = _left(p, p.x, p.gate_up_input_scale, slots, sorted_rows=False)
    rows, pre = quantized_up(
        tokens, slots, maps[first.rows], p.gate_up, p.gate_up_bias, p.activation, p.interleaved, keep, first, dtype,
        None if keep else _store(p, first),
    )  # fmt: skip
    if rows.form is None:
        rows = _left(p, rows.values, p.down_input_scale, slots, sorted_rows=True)
    out = quantized_product(rows, p.down, slots.ends, maps[second.rows], second, dtype, p.down_bias)
    return gather_sum(out, slots.row_of_slot, p.expert_weights, slots.top_k, dtype), pre


def _left(p: QuantProblem, values: Tensor, scale: Tensor | None, slots: SortedSlots, sorted_rows: bool) -> Rows:
    """The left operand of a product from floats: tokens, or activated rows (sorted_rows). scale is [E] or None."""
    a = p.rounding
    if a is None:
        return Rows(values=values.contiguous())
    if scale is not None:
        return quantize_by_expert(values, CODES[a.scheme], scale, slots.slot_of_row, p.expert_ids, sorted_rows)
    return quantize_rows(values, CODES[a.scheme], a.group_size, a.power_of_two_scales)


def _store(p: QuantProblem, tile: Tile) -> Store | None:
    """How the up-projection quantizes and stores activated rows; None if it stores floats."""
    a = p.rounding
    if a is None:
        return None
    if p.down_input_scale is not None:
        return Store(CODES[a.scheme], "expert", p.down_input_scale.contiguous())
    fits = a.group_size == tile.columns // p.activation.gate_up_parts
    return Store(CODES[a.scheme], "group", power_of_two=a.power_of_two_scales) if fits else None
