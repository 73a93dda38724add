"""The Triton backward kernels, interpreted on the CPU, compared with autograd through the same layer in float64."""

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("the kernels run on a CPU only in Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

from hypothesis import given, settings
from hypothesis import strategies as st
from triton_problems import ACTIVATIONS, DTYPES, SIZES, TILES, Rows, double, in_layout, routings

from moe_fn.config import ActivationConfig
from moe_fn.kernels.triton.down_backward import _sum_partials_kernel, down_backward
from moe_fn.kernels.triton.outer import grouped_outer, segment_sums
from moe_fn.kernels.triton.tiles import Tile
from moe_fn.stages._activation import activate
from moe_fn.testing import assert_matches

EXAMPLES = settings(max_examples=100)


@given(routings(), SIZES, SIZES, st.sampled_from(ACTIVATIONS), DTYPES, TILES, *[st.booleans()] * 5)
@EXAMPLES
def test_down_backward_is_the_gradient_of_the_weighted_down_projection(
    r: Rows, hidden: int, inner: int, activation: ActivationConfig, dtype: Any, tile: Tile, out_in: bool,
    interleaved: bool, biased: bool,
    weighted: bool, store: bool,
) -> None:  # fmt: skip
    make, live, num_rows = r.tensors(dtype), slice(0, r.live), r.ids.numel()
    down, bias = (
        r.by_expert(make(r.num_experts, inner, hidden, scale=hidden**-0.5)),
        r.by_expert(make(r.num_experts, hidden)),
    )
    pre = r.by_row(make(num_rows, 2 * inner if activation.gated else inner))
    gradient = r.by_token(make(r.ids.shape[0], hidden))
    weights = r.by_slot(make(*r.ids.shape).float().abs()) if weighted else None
    given_bias = bias if biased else None
    d_pre, stored, d_weights = down_backward(
        gradient,
        in_layout(down, out_in),
        given_bias,
        pre,
        weights,
        r.slots,
        r.tile_map(tile.rows),
        activation,
        interleaved,
        tile,
        store,
    )
    assert d_pre.dtype == stored.dtype == dtype and d_pre.shape == pre.shape
    assert stored.shape == ((num_rows, inner) if store else (0,))

    h, w = pre[live].double().requires_grad_(), torch.ones(r.live, dtype=torch.float64)
    if weights is not None:
        w = weights.flatten()[r.slots.slot_of_row[live].long()].double()
    w.requires_grad_()
    g, down_of_row = gradient[r.token_of_row[live]].double(), down.double()[r.expert_of_row[live]]
    a = activate(activation, h, "interleaved" if interleaved else "packed")
    y = torch.einsum("ri,rih->rh", a, down_of_row)
    y = y if given_bias is None else y + given_bias.double()[r.expert_of_row[live]]
    (y * w[:, None] * g).sum().backward()
    assert h.grad is not None and w.grad is not None and not h.grad.isnan().any()
    assert_matches(d_pre[live], h.grad, scale=0.1, name="d_pre")
    if store:
        assert_matches(stored[live], (a * w[:, None]).detach(), scale=0.1, name="weighted")
    expected = torch.zeros(num_rows, dtype=torch.float64).index_copy(0, r.slots.slot_of_row[live].long(), w.grad)
    assert d_weights.dtype == torch.float32
    assert_matches(d_weights, expected.view(r.ids.shape), scale=hidden**0.5, name="d_weights")


@given(routings(), SIZES, SIZES, DTYPES, TILES, st.sampled_from(["left", "right", "neither"]), st.booleans())
@EXAMPLES
def test_grouped_outer_sums_over_the_rows_of_each_group(
    r: Rows, left_width: int, right_width: int, dtype: Any, tile: Tile, gathered: str, wide: bool
) -> None:
    make = r.tensors(dtype)

    def side(name: str, width: int) -> torch.Tensor:
        return r.by_token(make(r.ids.shape[0], width)) if gathered == name else r.by_row(make(r.ids.numel(), width))

    left, right = side("left", left_width), side("right", right_width)
    found = grouped_outer(
        left, right, r.slots.starts[:-1], r.slots.starts[1:], tile,
        None if gathered == "neither" else r.slots.slot_of_row, r.slots.top_k,
        gather_left=gathered == "left", gather_right=gathered == "right", dtype=torch.float32 if wide else None,
    )  # fmt: skip
    assert found.dtype == (torch.float32 if wide else dtype)
    left, right = double(left, right)
    left, right = (s[r.token_of_row] if gathered == name else s for s, name in ((left, "left"), (right, "right")))
    expected = torch.zeros(r.num_experts, left_width, right_width, dtype=torch.float64)
    for e, (first, end) in enumerate(zip(r.slots.starts[:-1].tolist(), r.slots.starts[1:].tolist(), strict=True)):
        expected[e] = left[first:end].T @ right[first:end]
    assert_matches(found, expected, scale=1.0)


@given(routings(), st.sampled_from([1, 7, 16, 33, 200]), DTYPES, st.booleans(), st.booleans())
@EXAMPLES
def test_segment_sums_add_up_the_rows_of_each_group(
    r: Rows, width: int, dtype: Any, gather: bool, weighted: bool
) -> None:
    make = r.tensors(dtype)
    rows = r.by_token(make(r.ids.shape[0], width)) if gather else r.by_row(make(r.ids.numel(), width))
    weights = r.by_slot(make(*r.ids.shape).float())
    of_row = weights.flatten()[r.slots.slot_of_row.long()]
    given_weights = (weights if gather else of_row) if weighted else None
    starts, ends = r.slots.starts[:-1], r.slots.starts[1:]
    found = segment_sums(
        rows, starts, ends, given_weights, r.slots.slot_of_row if gather else None, r.slots.top_k if gather else 1
    )
    assert found.dtype == torch.float32
    of_row = of_row.double() if weighted else torch.ones(r.ids.numel(), dtype=torch.float64)
    terms = (rows[r.token_of_row] if gather else rows).double() * of_row[:, None]
    expected = torch.stack([terms[first:end].sum(0) for first, end in zip(starts.tolist(), ends.tolist(), strict=True)])
    assert_matches(found, expected, scale=1.0)


def test_gradients_are_the_same_bits_on_every_call() -> None:
    """There are no atomics: partial sums are added in one order."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(100, 40, generator=generator)
    starts, ends = torch.tensor([0, 30], dtype=torch.int32), torch.tensor([30, 100], dtype=torch.int32)
    tile = Tile(16, 16, 16, 1, 1)
    assert torch.equal(grouped_outer(rows, rows, starts, ends, tile), grouped_outer(rows, rows, starts, ends, tile))
    assert torch.equal(segment_sums(rows, starts, ends), segment_sums(rows, starts, ends))


def test_weights_of_slots_without_an_expert_have_no_gradient() -> None:
    """The row before the first one, at index -1, is not read."""
    before_and_partials = torch.tensor([[torch.nan] * 3, [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    row_of_slot, out = torch.tensor([-1, 1, 0, -1], dtype=torch.int32), torch.full((4,), torch.nan)
    _sum_partials_kernel[(1,)](before_and_partials[1:], row_of_slot, out, 4, 3, BLOCK=16, WIDTH=4)
    assert out.tolist() == [0.0, 15.0, 6.0, 0.0]
