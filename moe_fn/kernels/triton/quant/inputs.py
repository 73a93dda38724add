# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Quantizes activations: rows of codes with a scale for each row, for each group of a row, or for each expert."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fn.kernels.triton.quant.matrix import QuantMatrix, codes_of

ELEMENTS = 1024  # per program and iteration, with 4 warps
CASTS_E4M3 = ("sm_89", "sm_90", "sm_100")
MOST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The left operand [R, K] of a product: floats, or codes with float32 scales [R, groups] (form "row" or "group") or
    [E] ("expert").
    """

    values: Tensor
    scale: Tensor | None = None
    form: Literal["row", "group", "expert"] | None = None
    group: int = 1

    @property
    def groups(self) -> int:
        """The number of scales of a row."""
        return 1 if self.scale is None or self.form == "expert" else self.scale.shape[1]

    def scale_or(self, other: Tensor) -> Tensor:
        """The scale, or `other` without one."""
        return other if self.scale is None else self.scale

    def payload_of(self, matrix: QuantMatrix, arch: str) -> Tensor:
        """The matrix's payload: in its own dtype for products of codes, and if casts from e4m3 are instructions (470
        instructions in the loop instead of 1,600); else as bits, which the kernel decodes.
        """
        native = self.form is not None or arch in CASTS_E4M3
        return matrix.payload if native else codes_of(matrix.payload)

    def constants(self) -> dict[str, Any]:
        """The constexpr arguments of the products' kernels."""
        return {"LEFT": self.form, "LEFT_GROUP": self.group}


@triton.jit
def scale_of(most, FORM: tl.constexpr, POWER_OF_TWO: tl.constexpr, MOST: tl.constexpr):
    """The float32 scale of values up to `most`, with correctly rounded divisions as in torch."""
    if FORM == "row" and MOST == 448.0:
        s = tl.math.div_rn(most, 448.0)
        return tl.where(s < 4.3596540178571428e-06, 4.3596540178571428e-06, s)  # 1 / (448 * 512)
    s = tl.math.div_rn(tl.where(most < 1e-10, 1e-10, most), MOST)
    if POWER_OF_TWO:  # the next power of two: a nonzero mantissa carries into the exponent
        s = ((s.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return s


@triton.jit
def code(values, s, MOST: tl.constexpr):
    """values / s clamped to the codes' range, as floats; NaN is kept.

    For int8 they are rounded to the nearest integer, ties to even.
    """
    q = tl.math.div_rn(values, s)
    LEAST: tl.constexpr = -128.0 if MOST == 127.0 else -MOST
    q = tl.where(q > MOST, MOST, tl.where(q < LEAST, LEAST, q))
    if MOST == 127.0:
        q = q + 12582912.0 - 12582912.0  # 1.5 * 2^23: the sum has no fraction bits
    return q


@triton.jit
def _quantize_kernel(
    x, out, scale, slot_of_row, expert_ids, lines, K, num_experts, stride_x,
    FORM: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr, POWER_OF_TWO: tl.constexpr, TOP_K: tl.constexpr,
    MOST: tl.constexpr,
    LINES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Quantizes LINES lines: line l is group l % SPANS of row l // SPANS, with SPAN values.

    With experts' scales, rows are read by the slot's token, or with TOP_K 0 by row.
    """
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    row, first = (line // SPANS).to(tl.int64), line % SPANS * SPAN
    live, source = line < lines, row
    column = tl.arange(0, WIDTH)
    last = tl.minimum(first + SPAN, K)
    if FORM == "expert":
        slot = tl.load(slot_of_row + row, mask=live, other=0)
        expert = tl.load(expert_ids + slot, mask=live, other=-1)
        live = live & (expert >= 0) & (expert < num_experts)
        if TOP_K > 0:
            source = (slot // TOP_K).to(tl.int64)
        s = tl.load(scale + expert, mask=live, other=1.0)
    else:
        most = tl.zeros((LINES,), tl.float32)
        for start in range(0, SPAN, WIDTH):
            c = first[:, None] + start + column[None, :]
            values = tl.load(
                x + source[:, None] * stride_x + c, mask=live[:, None] & (c < last[:, None]), other=0.0
            ).to(tl.float32)
            most = tl.maximum(most, tl.max(tl.abs(values), 1))
        s = scale_of(most, FORM, POWER_OF_TWO, MOST)
        tl.store(scale + line, s, mask=live)
    for start in range(0, SPAN, WIDTH):
        c = first[:, None] + start + column[None, :]
        mask = live[:, None] & (c < last[:, None])
        values = tl.load(x + source[:, None] * stride_x + c, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row[:, None] * K + c, code(values, s[:, None], MOST).to(out.dtype.element_ty), mask=mask)


def quantize_rows(x: Tensor, dtype: torch.dtype, group: int | None = None, power_of_two: bool = False) -> Rows:
    """x [R, K] as float8_e4m3fn or int8 codes, with a scale for each row, or for each `group` values of a row (the last
    group may be smaller).

    row:   s = max(amax / 448, 1 / (448 * 512)) for float8_e4m3fn, max(amax, 1e-10) / 127 for int8
    group: s = max(amax, 1e-10) / 448 or / 127, with power_of_two the next power of two;  code = round(clamp(x / s))
    """
    span = x.shape[1] if group is None else group
    return _quantized(x, x.shape[0], dtype, "row" if group is None else "group", span, power_of_two)


def quantize_by_expert(
    x: Tensor, dtype: torch.dtype, scale: Tensor, slot_of_row: Tensor, expert_ids: Tensor, sorted_rows: bool
) -> Rows:
    """Codes [R, K] of x[token of row r], or of x[r] if sorted_rows, with the scale [E] of row r's expert; rows without
    an expert are not written.
    """
    about = slot_of_row, expert_ids, 0 if sorted_rows else expert_ids.shape[1]
    return _quantized(x, slot_of_row.shape[0], dtype, "expert", x.shape[1], False, scale.contiguous(), *about)


def _quantized(
    x: Tensor, rows: int, dtype: torch.dtype, form: Literal["row", "group", "expert"], span: int, power_of_two: bool,
    scale: Tensor | None = None, slot_of_row: Tensor | None = None, expert_ids: Tensor | None = None, top_k: int = 1,
) -> Rows:  # fmt: skip
    x = x if x.stride(-1) == 1 else x.contiguous()
    out, spans = x.new_empty((rows, x.shape[1]), dtype=dtype), triton.cdiv(x.shape[1], span)
    scale = x.new_empty((rows, spans), dtype=torch.float32) if scale is None else scale
    if out.numel() == 0:
        return Rows(values=out, scale=scale, form=form, group=span)
    width = min(ELEMENTS, triton.next_power_of_2(span))
    lines = ELEMENTS // width
    _quantize_kernel[(triton.cdiv(rows * spans, lines),)](
        x, out, scale, slot_of_row, expert_ids, rows * spans, x.shape[1], 0 if expert_ids is None else scale.shape[0],
        x.stride(0),
        FORM=form, SPAN=span, SPANS=spans, POWER_OF_TWO=power_of_two, TOP_K=top_k,
        MOST=MOST[dtype], LINES=lines, WIDTH=width, num_warps=4,
    )  # fmt: skip
    return Rows(values=out, scale=scale, form=form, group=span)
