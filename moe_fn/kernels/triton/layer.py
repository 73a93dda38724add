"""Tokens through their experts and back, and the gradients of that: which kernels run, in which order.

    forward   sort -> up (gather, product, activation) -> down -> combine 4 launches, 6 from 1025 slots on
    decode    up of slots -> down of slots with the sum, where slots hardly share experts         2 launches
    backward  sort -> [up again] -> d pre-activations, d weights -> d gate_up, d down, d biases -> d rows -> d x

What is kept for gradients is `pre`, rows x 2I of what the activation got, and nothing else; the down-projection's
result is not needed, for d weight[slot] = <d activated, activated> (SonicMoE, arXiv 2512.14080). Grids are upper bounds
from static sizes and surplus programs return, so nothing waits for the device, and a CUDA graph replays with any
routing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from moe_fn.config import ActivationConfig
from moe_fn.kernels.triton.combine import gather_sum
from moe_fn.kernels.triton.down_backward import down_backward
from moe_fn.kernels.triton.metadata import sort_for_tiles
from moe_fn.kernels.triton.outer import grouped_outer, segment_sums
from moe_fn.kernels.triton.products import grouped_product
from moe_fn.kernels.triton.slots import SortedSlots
from moe_fn.kernels.triton.small_batch import down_of_slots, up_of_slots
from moe_fn.kernels.triton.tiles import (
    Tile,
    architecture_of,
    decode_down_tile,
    decode_up_tile,
    down_backward_tile,
    outer_tile,
    product_tile,
    rows_of_tiles,
    up_tile,
)
from moe_fn.kernels.triton.up import up


@dataclass(frozen=True)
class Problem:
    """The layer's arguments: x [T, H], expert_ids and float32 expert_weights [T, k], gate_up [E, H, N] and down [E, I,
    H] by strides.
    """

    x: Tensor
    expert_ids: Tensor
    expert_weights: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: ActivationConfig
    interleaved: bool
    invariant: bool = False  # no bit of a token's result depends on the other tokens

    @property
    def rows(self) -> int:
        """Slots, tokens * top_k, as far as tiles know of them."""
        return rows_of_tiles(self.expert_ids.numel(), self.gate_up.shape[0], self.invariant)

    def tile(self, choose: Callable[[int, int, int, int, int, str], Tile], inner: int, columns: int) -> Tile:
        """The tile of one of this layer's kernels."""
        return choose(
            self.rows, self.gate_up.shape[0], inner, columns, self.x.element_size(), architecture_of(self.x.device)
        )

    def up_tile(self) -> Tile:
        """The tile of the up-projection, the same forward and when it is computed again."""
        return self.tile(up_tile, *self.gate_up.shape[1:])


def forward(problem: Problem, keep: bool) -> tuple[Tensor, Tensor]:
    """(y [T, H], pre [R, N] in the order of the rows, or [0] unless kept)."""
    p = problem
    if not (keep or p.invariant) and p.rows * 4 <= p.gate_up.shape[0]:
        return decode(p), p.x.new_empty(0)
    first, second = p.up_tile(), p.tile(product_tile, *p.down.shape[1:])
    slots, maps = sort_for_tiles(p.expert_ids, p.gate_up.shape[0], first, second)
    activated, pre = up(
        p.x, slots, maps[first.rows], p.gate_up, p.gate_up_bias, p.activation, p.interleaved, keep, first
    )
    rows = grouped_product(activated, p.down, slots.ends, maps[second.rows], second, p.down_bias)
    return gather_sum(rows, slots.row_of_slot, p.expert_weights, slots.top_k, p.x.dtype), pre


def decode(problem: Problem) -> Tensor:
    """y [T, H] without sorting: every slot reads its expert's weights for itself, which costs nothing where few share
    one.
    """
    p = problem
    in_out = p.gate_up.stride(-1) == 1
    first = p.tile(partial(decode_up_tile, in_out=in_out), *p.gate_up.shape[1:])
    second = p.tile(partial(decode_down_tile, in_out=in_out, top_k=p.expert_ids.shape[1]), *p.down.shape[1:])
    activated = up_of_slots(p.x, p.expert_ids, p.gate_up, p.gate_up_bias, p.activation, p.interleaved, first)
    return down_of_slots(activated, p.expert_ids, p.expert_weights, p.down, p.down_bias, p.x.dtype, second)


def backward(
    problem: Problem, gradient: Tensor, pre: Tensor, needed: tuple[bool, ...], transposed: bool
) -> list[Tensor | None]:
    """Gradients of x, expert_weights, gate_up, down, gate_up_bias, down_bias, None where not needed; pre may be empty.

    Gradients of the weights are [E, N, H] and [E, H, I] if transposed, else [E, H, N] and [E, I, H].
    """
    p, (x_needed, weights_needed, gate_up_needed, down_needed, gate_up_bias_needed, down_bias_needed) = problem, needed
    hidden, columns = p.gate_up.shape[1:]
    inner = p.down.shape[1]
    first, second, third = p.up_tile(), p.tile(down_backward_tile, hidden, inner), p.tile(product_tile, columns, hidden)
    slots, maps = sort_for_tiles(p.expert_ids, p.gate_up.shape[0], first, second, third)
    starts, ends = slots.begins, slots.ends
    if pre.ndim != 2:
        pre = up(p.x, slots, maps[first.rows], p.gate_up, p.gate_up_bias, p.activation, p.interleaved, True, first)[1]
    d_pre, weighted, d_weights = down_backward(
        gradient, p.down, p.down_bias if weights_needed else None, pre, p.expert_weights, slots, maps[second.rows],
        p.activation,
        p.interleaved, second, store_activated=down_needed,
    )  # fmt: skip
    d_x = d_gate_up = d_down = None
    if down_needed:
        d_down = (
            _outer(p, gradient, weighted, slots, "left")
            if transposed
            else _outer(p, weighted, gradient, slots, "right")
        )
    del weighted
    if gate_up_needed:
        d_gate_up = _outer(p, d_pre, p.x, slots, "right") if transposed else _outer(p, p.x, d_pre, slots, "left")
    if x_needed:
        d_rows = grouped_product(d_pre, p.gate_up.mT, ends, maps[third.rows], third)
        d_x = gather_sum(d_rows, slots.row_of_slot, None, slots.top_k, p.x.dtype)
    return [
        d_x,
        d_weights if weights_needed else None,
        d_gate_up,
        d_down,
        segment_sums(d_pre, starts, ends) if gate_up_bias_needed else None,
        segment_sums(gradient, starts, ends, p.expert_weights, slots.slot_of_row, slots.top_k)
        if down_bias_needed
        else None,
    ]


def _outer(problem: Problem, left: Tensor, right: Tensor, slots: SortedSlots, by_token: str) -> Tensor:
    """left[rows of e].T @ right[rows of e]; the side by_token is gathered."""
    return grouped_outer(
        left, right, slots.begins, slots.ends, problem.tile(outer_tile, left.shape[1], right.shape[1]),
        slots.slot_of_row, slots.top_k, gather_left=by_token == "left", gather_right=by_token == "right",
    )  # fmt: skip
