"""The Triton kernels of the up-projection, grouped products and activations, interpreted on the CPU, compared with
float64 in plain torch.
"""

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("the kernels run on a CPU only in Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_problems import ACTIVATIONS, DTYPES, NAN, SIZES, TILES, Rows, double, in_layout, routings

from moe_fn.config import ActivationConfig
from moe_fn.kernels.triton.activation import act, act_backward, tanh
from moe_fn.kernels.triton.products import grouped_product
from moe_fn.kernels.triton.slots import SortedSlots, TileMap
from moe_fn.kernels.triton.tiles import Tile
from moe_fn.kernels.triton.up import up
from moe_fn.stages._activation import activate
from moe_fn.testing import assert_matches

EXAMPLES = settings(max_examples=100)


@triton.jit
def _act_kernel(
    gate, up, d, value, d_gate, d_up, ACTIVATION: tl.constexpr, N: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    i = tl.arange(0, N)
    g, u = tl.load(gate + i), tl.load(up + i)
    tl.store(value + i, act(g, u, ACTIVATION))
    dg, du = act_backward(tl.load(d + i), g, u, ACTIVATION)
    tl.store(d_gate + i, dg)
    tl.store(d_up + i, du)


@triton.jit
def _tanh_kernel(x, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    tl.store(out + i, tanh(tl.load(x + i)))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations_and_their_derivatives_are_those_of_torch(activation: ActivationConfig) -> None:
    """At 512 points: random ones, and every pair of points at a clamp or a kink."""
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 7.0, -7.0, 30.0, -30.0, 90.0, -90.0])
    gate, up = (
        torch.cat([2 * torch.randn(368, generator=generator), s.flatten()])
        for s in torch.meshgrid(special, special, indexing="ij")
    )
    d = torch.randn(512, generator=generator)
    value, d_gate, d_up = (torch.full_like(d, NAN) for _ in range(3))
    _act_kernel[(1,)](gate, up, d, value, d_gate, d_up, ACTIVATION=activation, N=512)
    h = (torch.cat([gate, up]) if activation.gated else gate).double().requires_grad_()
    expected = activate(activation, h)
    expected.backward(d.double())
    assert h.grad is not None
    assert_matches(value, expected.detach(), tolerance=1e-6)
    assert_matches(torch.cat([d_gate, d_up]) if activation.gated else d_gate, h.grad, tolerance=1e-6)
    near_zero = gate.abs() < 1  # large terms must not hide small ones
    assert_matches(value[near_zero], expected.detach()[near_zero], tolerance=1e-6)


def test_tanh_is_exact_near_zero_and_keeps_infinities_and_nan() -> None:
    small = torch.logspace(-30, 1.5, 500)
    x = torch.cat([small, -small, torch.tensor([0.0, torch.inf, -torch.inf, NAN]), torch.zeros(20)])
    out = torch.empty_like(x)
    _tanh_kernel[(1,)](x, out, N=1024)
    torch.testing.assert_close(out.double(), x.double().tanh(), rtol=5e-7, atol=0.0, equal_nan=True)


def product_in_float64(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group_of_row: torch.Tensor
) -> torch.Tensor:
    rows, weight, bias = double(rows, weight, bias)
    out = torch.einsum("rk,rkn->rn", rows, weight[group_of_row])
    return out if bias is None else out + bias[group_of_row]


@given(routings(), SIZES, SIZES, st.sampled_from(ACTIVATIONS), DTYPES, TILES, *[st.booleans()] * 4)
@EXAMPLES
def test_up_gathers_multiplies_and_activates(
    r: Rows, hidden: int, inner: int, activation: ActivationConfig, dtype: Any, tile: Tile, out_in: bool,
    interleaved: bool, biased: bool,
    keep: bool,
) -> None:  # fmt: skip
    make, columns = r.tensors(dtype), 2 * inner if activation.gated else inner
    x = r.by_token(make(r.ids.shape[0], hidden))
    weight, bias = (
        r.by_expert(make(r.num_experts, hidden, columns, scale=hidden**-0.5)),
        r.by_expert(make(r.num_experts, columns)),
    )
    given_bias = bias if biased else None
    activated, pre = up(
        x, r.slots, r.tile_map(tile.rows), in_layout(weight, out_in), given_bias, activation, interleaved, keep, tile
    )  # fmt: skip
    assert activated.shape == (r.ids.numel(), inner) and activated.dtype == dtype
    assert pre.shape == ((r.ids.numel(), columns) if keep else (0,))
    live = slice(0, r.live)
    expected = product_in_float64(x[r.token_of_row[live]], weight, given_bias, r.expert_of_row[live])
    assert not expected.isnan().any()
    layout = "interleaved" if interleaved else "packed"
    assert_matches(activated[live], activate(activation, expected, layout), scale=0.1, name="activated")
    if keep:
        assert_matches(pre[live], expected, scale=0.1, name="pre")


@given(routings(), SIZES, SIZES, DTYPES, TILES, *[st.booleans()] * 5)
@EXAMPLES
def test_grouped_products_multiply_each_row_by_its_group(
    r: Rows,
    inner: int,
    columns: int,
    dtype: Any,
    tile: Tile,
    out_in: bool,
    biased: bool,
    gather: bool,
    shared: bool,
    zero_rest: bool,
) -> None:
    make, live = r.tensors(dtype), slice(0, r.live)
    weight, bias = make(r.num_experts, inner, columns, scale=inner**-0.5), make(r.num_experts, columns)
    weight, bias = (t if shared else r.by_expert(t) for t in (weight, bias))
    rows = r.by_token(make(r.ids.shape[0], inner)) if gather else r.by_row(make(r.ids.numel(), inner))
    order = torch.arange(r.num_experts - 1, -1, -1, dtype=torch.int32) if shared else None
    given_bias = bias if biased else None
    out = grouped_product(
        rows, in_layout(weight, out_in), r.slots.starts[1:], r.tile_map(tile.rows), tile, given_bias,
        r.slots.slot_of_row if gather else None, r.slots.top_k if gather else 1, order, zero_rest,
    )  # fmt: skip
    assert out.shape == (r.ids.numel(), columns) and out.dtype == dtype
    group = r.expert_of_row[live] if order is None else order.long()[r.expert_of_row[live]]
    expected = product_in_float64(rows[r.token_of_row[live] if gather else live], weight, given_bias, group)
    assert not expected.isnan().any()
    assert_matches(out[live], expected, scale=0.1)
    assert not zero_rest or not out[r.live :].any()


def test_groups_may_lie_anywhere() -> None:
    """Groups are given by ends and a tile map: rows in gaps between groups are not written. Sums of integers
    are exact.
    """
    rows, weight = torch.arange(40.0).reshape(10, 4), torch.ones(2, 4, 3)
    tile_map = TileMap(torch.tensor([0, 1, -1], dtype=torch.int32), torch.tensor([1, 6, -1], dtype=torch.int32), 16)
    out = grouped_product(
        rows, weight, torch.tensor([3, 9], dtype=torch.int32), tile_map, Tile(16, 16, 16, 1, 1), zero_rest=True
    )
    inside = torch.tensor([0, 1, 1, 0, 0, 0, 1, 1, 1, 0])[:, None]
    torch.testing.assert_close(out, rows @ weight[0] * inside)


def test_a_wide_tile_is_stored_in_pieces() -> None:
    """256 columns are stored in two pieces, each with its own gates and ups."""
    generator = torch.Generator().manual_seed(0)
    order = torch.arange(20, dtype=torch.int32)
    slots = SortedSlots(order, order, torch.tensor([0, 20], dtype=torch.int32), 1)
    tile_map = TileMap(torch.tensor([0, 0], dtype=torch.int32), torch.tensor([0, 16], dtype=torch.int32), 16)
    x = torch.randn(20, 24, generator=generator)
    for activation in (ACTIVATIONS[0], ActivationConfig(gated=False)):
        for interleaved in (False, True):
            weight = torch.randn(1, 24, 300, generator=generator) * 0.2
            activated, pre = up(
                x, slots, tile_map, weight, None, activation, interleaved, True, Tile(16, 256, 16, 1, 1)
            )
            assert_matches(pre, x.double() @ weight[0].double())
            assert_matches(
                activated,
                activate(activation, x.double() @ weight[0].double(), "interleaved" if interleaved else "packed"),
            )
