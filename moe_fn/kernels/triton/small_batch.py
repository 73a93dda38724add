# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Few slots, many experts: a slot has its expert's weights to itself, so nothing is sorted and no matrix unit is of
use.

Both kernels stream weights, and are sized by what has to be under way to keep the memory busy: 4.3 TB/s * 0.8 us = 3.4
MB, 26 KB a processor on an H200. Their loops have no dot, so Triton prefetches only where `tl.range` says how many
stages (0 -> 48 cp.async).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fn.config import ActivationConfig
from moe_fn.kernels.triton.activation import act
from moe_fn.kernels.triton.tiles import Tile


@triton.jit
def _gate_and_up(h, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACTIVATED: tl.constexpr):
    """Columns as they were loaded -> gates and ups; twice the columns themselves if not gated."""
    if not GATED:
        return h, h
    elif INTERLEAVED:  # elif and else: what stands behind a return is compiled all the same
        return tl.split(tl.reshape(h, (ACTIVATED, 2)))
    else:
        return tl.split(tl.trans(tl.reshape(h, (2, ACTIVATED))))


@triton.jit
def _up_kernel(
    x, expert_ids, weight, bias, activated, num_experts, hidden, intermediate, stride_x, stride_expert, stride_in,
    stride_out,
    TOP_K: tl.constexpr, BIAS: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """activated[s] = activation(x[s // TOP_K] @ weight[e] + bias[e]); slots of no expert are left as they are."""
    GATED: tl.constexpr = ACTIVATION.gated
    ACTIVATED: tl.constexpr = COLUMNS // 2 if GATED else COLUMNS
    WIDTH: tl.constexpr = 2 if GATED else 1
    slot = tl.program_id(0)
    expert = tl.load(expert_ids + slot)
    if (expert >= 0) & (expert < num_experts):
        first = tl.program_id(1) * ACTIVATED
        c = tl.arange(0, COLUMNS)
        n = first + (c // 2 if GATED and INTERLEAVED else c % ACTIVATED)  # the activated column that a column goes into
        column = first * WIDTH + c if INTERLEAVED or not GATED else n + c // ACTIVATED * intermediate
        k = tl.arange(0, INNER)
        token = x + (slot // TOP_K).to(tl.int64) * stride_x
        matrix = weight + expert.to(tl.int64) * stride_expert + column.to(tl.int64)[:, None] * stride_out
        products = tl.zeros((COLUMNS, INNER), tl.float32)
        for start in tl.range(0, hidden, INNER, num_stages=STAGES):
            live = start + k < hidden
            place = (start + k).to(tl.int64) * stride_in
            w = tl.load(matrix + place[None, :], mask=live[None, :] & (n < intermediate)[:, None], other=0.0).to(
                tl.float32
            )
            products += w * tl.load(token + start + k, mask=live, other=0.0).to(tl.float32)[None, :]
        h = tl.sum(products, 1)
        if BIAS:
            h += tl.load(
                bias + expert.to(tl.int64) * (WIDTH * intermediate) + column, mask=n < intermediate, other=0.0
            ).to(tl.float32)
        gate, up = _gate_and_up(h, GATED, INTERLEAVED, ACTIVATED)
        value = act(gate, up, ACTIVATION)
        n = first + tl.arange(0, ACTIVATED)
        tl.store(
            activated + slot.to(tl.int64) * intermediate + n,
            value.to(activated.dtype.element_ty),
            mask=n < intermediate,
        )


@triton.jit
def _down_kernel(
    activated, expert_ids, weights, weight, bias, out, num_experts, intermediate, hidden, stride_expert, stride_in,
    stride_out,
    TOP_K: tl.constexpr, BIAS: tl.constexpr, CHOICES: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over j of weights[t, j] * (activated[t, j] @ weight[e] + bias[e]).

    CHOICES experts of a token are rows of one tile, so that all their weights are under way at once: one expert after
    the other pays the latency of the memory for each of them, 10 us where the bytes take 6.
    """
    t = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, CHOICES * COLUMNS)
    n = tl.program_id(1) * COLUMNS + r % COLUMNS
    k = tl.arange(0, INNER)
    total = tl.zeros((COLUMNS,), tl.float32)
    for j0 in tl.static_range(0, TOP_K, CHOICES):
        j = j0 + r // COLUMNS
        slot = t * TOP_K + j
        expert = tl.load(expert_ids + slot, mask=j < TOP_K, other=-1)
        used = (expert >= 0) & (expert < num_experts)
        live = used & (n < hidden)
        matrix = weight + tl.where(used, expert, 0).to(tl.int64) * stride_expert + n.to(tl.int64) * stride_out
        row = activated + slot * intermediate
        products = tl.zeros((CHOICES * COLUMNS, INNER), tl.float32)
        for start in tl.range(0, intermediate, INNER, num_stages=STAGES):
            mask = live[:, None] & (start + k < intermediate)[None, :]
            place = (start + k).to(tl.int64) * stride_in
            w = tl.load(matrix[:, None] + place[None, :], mask=mask, other=0.0).to(tl.float32)
            products += w * tl.load(row[:, None] + (start + k)[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.sum(products, 1)
        if BIAS:
            y += tl.load(bias + tl.where(used, expert, 0).to(tl.int64) * hidden + n, mask=live, other=0.0).to(
                tl.float32
            )
        y *= tl.load(weights + slot, mask=used, other=0.0)
        total += tl.sum(tl.reshape(y, (CHOICES, COLUMNS)), 0)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(out + t * hidden + n, total.to(out.dtype.element_ty), mask=n < hidden)


def up_of_slots(
    x: Tensor,
    expert_ids: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    activation: ActivationConfig,
    interleaved: bool,
    tile: Tile,
) -> Tensor:
    """activation(x[t] @ gate_up[e] + bias[e]) for every slot, e its expert: [T, H] -> [T * top_k, I] in the order of
    slots.

    x [T, H]; expert_ids [T, top_k] integers; gate_up [E, H, N] by strides, bias [E, N]. Rows of slots of no expert are
    not written. tile: columns of the weights (gate and up together) by inner elements of H; its rows count nothing
    here.
    """
    slots, hidden, columns = expert_ids.numel(), x.shape[1], gate_up.shape[-1]
    intermediate = columns // activation.gate_up_parts
    activated = x.new_empty((slots, intermediate))
    if slots == 0:
        return activated
    x = x if x.stride(-1) == 1 else x.contiguous()
    programs = triton.cdiv(intermediate, tile.columns // activation.gate_up_parts)
    _up_kernel[(slots, programs)](
        x, expert_ids.contiguous(), gate_up, gate_up if gate_up_bias is None else gate_up_bias.contiguous(), activated,
        gate_up.shape[0], hidden, intermediate, x.stride(0), *gate_up.stride(),
        TOP_K=expert_ids.shape[1], BIAS=gate_up_bias is not None, INTERLEAVED=interleaved,
        ACTIVATION=activation,
        COLUMNS=tile.columns, INNER=tile.inner, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return activated


def down_of_slots(
    activated: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    dtype: torch.dtype,
    tile: Tile,
) -> Tensor:
    """y[t] = sum over j of weights[t, j] * (activated[slot] @ down[e] + bias[e]), slot = t * top_k + j: [T * top_k, I]
    -> [T, H].

    expert_ids [T, top_k] integers, weights [T, top_k] float32; down [E, I, H] by strides, bias [E, H]. Summed in
    float32, rounded once to dtype; nothing of slots of no expert is read. tile: rows choices of a token at once,
    columns of H by inner elements of I.
    """
    num_tokens, top_k = expert_ids.shape
    out = activated.new_empty((num_tokens, down.shape[-1]), dtype=dtype)
    if out.numel() == 0:
        return out
    _down_kernel[(num_tokens, triton.cdiv(down.shape[-1], tile.columns))](
        activated.contiguous(), expert_ids.contiguous(), weights.contiguous(), down,
        down if down_bias is None else down_bias.contiguous(),
        out, down.shape[0], down.shape[1], down.shape[2], *down.stride(),
        TOP_K=top_k, BIAS=down_bias is not None, CHOICES=min(tile.rows, triton.next_power_of_2(top_k)),
        COLUMNS=tile.columns,
        INNER=tile.inner, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out
