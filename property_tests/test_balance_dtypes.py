"""Balancing in half precision, for any number of tokens: counts are exact and sums are float32 for any input dtype."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from support import law
from torch import Tensor

import moe_fn
from moe_fn import MoEConfig, RouterConfig, balance
from moe_fn.testing import assert_matches, weights_for

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32, torch.float64)
SEEDS = st.integers(0, 2**20)
MANY = 65536  # the first count that is infinite in float16


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@law(st.sampled_from(FLOATS), st.integers(0, 300), st.booleans(), SEEDS)
def test_losses_in_narrow_dtypes_equal_those_in_float64(
    dtype: torch.dtype, tokens: int, masked: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, 4, generator=generator).to(dtype)
    scores = torch.softmax(logits, -1)
    ids = torch.randint(-1, 4, (tokens, 2), generator=generator)
    mask = torch.rand(tokens, generator=generator) < 0.7 if masked else None
    for given, loss in (
        (logits, lambda z: balance.router_z_loss(z, mask)),
        (scores, lambda s: balance.load_balancing_loss(s, ids, mask)),
        (scores, lambda s: balance.sequence_balancing_loss(s[None], ids[None], None if mask is None else mask[None])),
    ):
        narrow, exact = given.clone().requires_grad_(), given.double().requires_grad_()
        found, expected = loss(narrow), loss(exact)
        assert found.dtype == wide(dtype)
        assert_matches(found, expected, tolerance=1e-6, scale=0.1)
        (gradient,), (right,) = torch.autograd.grad(found, narrow), torch.autograd.grad(expected, exact)
        assert_matches(
            gradient,
            right,
            tolerance={**dict.fromkeys(HALVES, 1e-2), torch.float32: 1e-5, torch.float64: 1e-12},
            scale=1e-3,
        )


def test_leading_dimensions_are_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(2, 3, 4, generator=generator), torch.randint(-1, 4, (2, 3, 2), generator=generator)
    mask, placement = (
        torch.tensor([[True, False, True], [True, True, False]]),
        balance.placement_of_slots(torch.arange(6) % 4, num_experts=4),
    )
    for of_tokens in (
        lambda z, ids, mask: balance.router_z_loss(z, mask),
        lambda z, ids, mask: balance.expert_load(ids, 4),
        lambda z, ids, mask: balance.physical_ids(placement, ids).view(-1, 2),
    ):
        assert_matches(of_tokens(logits, ids, mask), of_tokens(logits.flatten(0, 1), ids.flatten(0, 1), mask.flatten()))
    assert balance.physical_ids(placement, ids).shape == ids.shape


def test_what_balancing_makes_is_where_its_arguments_are() -> None:
    """Runs on meta tensors: a tensor on another device would raise an error in an operation with one of them."""
    logits, ids = torch.empty(2, 3, 4, device="meta"), torch.empty(2, 3, 2, dtype=torch.int64, device="meta")
    mask, load = torch.empty(2, 3, dtype=torch.bool, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    for made in (
        balance.router_z_loss(logits, mask),
        balance.load_balancing_loss(logits[0], ids[0], mask[0]),
        balance.sequence_balancing_loss(logits, ids, mask),
        balance.expert_load(ids, 4),
        balance.update_correction_bias(logits[0, 0], load, 1e-3),
        balance.total(balance.push(balance.load_window(2, 4, device="meta"), load)),
        balance.balancedness(load),
    ):
        assert made.device == torch.device("meta")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_even_scores_of_many_tokens_have_the_losses_of_balance(dtype: torch.dtype) -> None:
    scores = torch.full((MANY, 4), 0.25, dtype=dtype, requires_grad=True)
    ids = torch.arange(MANY * 2).view(MANY, 2) % 4
    over_all, by_sequence = (
        balance.load_balancing_loss(scores, ids),
        balance.sequence_balancing_loss(scores[None], ids[None]),
    )
    assert over_all.tolist() == 2.0 and by_sequence.tolist() == 1.0
    (gradient,) = torch.autograd.grad(over_all, scores)
    assert torch.allclose(gradient.double(), torch.full_like(gradient, 2 / MANY, dtype=torch.float64), rtol=1e-2)
    z = torch.zeros(MANY, 4, dtype=dtype)
    assert balance.router_z_loss(z, torch.ones(MANY, dtype=torch.bool)).item() == pytest.approx(
        torch.tensor(4.0).log().item() ** 2
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("how", ("the layer's dtype", "autocast"))
def test_stats_of_many_tokens_in_half_precision_are_those_of_float32(dtype: torch.dtype, how: str) -> None:
    config = MoEConfig(
        num_experts=4, top_k=2, hidden_size=4, intermediate_size=2, router=RouterConfig(score_dtype="input")
    )
    if how == "autocast":
        config = dataclasses.replace(config, router=RouterConfig())
    given = torch.float32 if how == "autocast" else dtype
    weights, logits = weights_for(config, dtype=given), torch.arange(4.0).expand(MANY, 4).to(given)
    shift = torch.arange(MANY).unsqueeze(1)
    # every expert is the first choice of every fourth token
    logits = logits.gather(1, (torch.arange(4) + shift) % 4).contiguous()
    with torch.autocast("cpu", dtype=dtype, enabled=how == "autocast"):
        _, stats = moe_fn.moe_forward_with_stats(config, weights, torch.zeros(MANY, 4, dtype=given), logits)
    assert stats.expert_load.tolist() == [MANY // 2] * 4
    for loss in (stats.router_z_loss, stats.load_balancing_loss, stats.sequence_balancing_loss):
        assert loss.dtype == torch.float32
    assert stats.load_balancing_loss.item() == pytest.approx(2.0, rel=1e-2)  # the scores are rounded, the sum is not
    assert stats.sequence_balancing_loss.item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("compiled", (False, True))
def test_more_tokens_than_float32_can_count_are_counted(compiled: bool) -> None:
    tokens = 2**25
    scores, ids = torch.full((tokens, 2), 0.5, dtype=torch.float16), torch.zeros(tokens, 1, dtype=torch.int8)
    loss = torch.compile(balance.load_balancing_loss) if compiled else balance.load_balancing_loss
    assert loss(scores, ids).item() == pytest.approx(1.0, rel=1e-6)


LOADS = st.integers(0, 3) | st.integers(2**24 - 1, 2**24 + 2) | st.integers(65503, 70000) | st.integers(0, 2**40)


@st.composite
def loads(draw: Any) -> list[list[int]]:
    """Returns loads [layers, E]; the means of layers differ widely."""
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    return [draw(st.lists(LOADS, min_size=experts, max_size=experts)) for _ in range(layers)]


@law(loads(), st.sampled_from(FLOATS), st.sampled_from((torch.int64, torch.float64)))
def test_a_bias_in_any_dtype_moves_by_exact_loads(
    load: list[list[int]], dtype: torch.dtype, of_load: torch.dtype
) -> None:
    bias = torch.linspace(-1, 1, len(load) * len(load[0])).view(len(load), -1).to(dtype)
    kept, rate = bias.clone(), 2.0**-10
    updated = balance.update_correction_bias(bias, torch.tensor(load, dtype=of_load), rate)
    assert updated.dtype == wide(dtype) and torch.equal(bias, kept)
    signs = [[(sum(row) > n * len(row)) - (sum(row) < n * len(row)) for n in row] for row in load]
    assert torch.equal(updated, bias.to(wide(dtype)) + rate * torch.tensor(signs))


def test_a_bias_that_began_in_half_precision_goes_on_moving() -> None:
    for dtype in HALVES:
        bias = torch.zeros(4, dtype=dtype)
        for _ in range(1000):
            bias = balance.update_correction_bias(bias, torch.tensor([1001, 1000, 1000, 999]), 1e-3)
        assert_matches(bias, torch.tensor([-1.0, 0.0, 0.0, 1.0]), tolerance=1e-4)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_loads_that_half_precision_cannot_say_are_summed(dtype: torch.dtype) -> None:
    placement = balance.placement_of_slots(torch.tensor([0, 0, 1]), num_experts=2)
    halves = torch.tensor([65000.0, 64000.0, 3.0]).to(dtype)
    of_experts = balance.logical_load(placement, halves)
    assert of_experts.dtype == torch.float32 and of_experts.tolist() == [halves[:2].double().sum().item(), 3.0]
    assert balance.logical_load(placement, torch.tensor([100, 100, 3], dtype=torch.uint8)).tolist() == [200, 3]
    assert balance.balancedness(halves).item() == pytest.approx(
        (halves.double().mean() / halves.double().amax()).item()
    )
    for of_load in (*FLOATS, torch.int64):
        expected = wide(of_load) if of_load.is_floating_point else torch.float64
        assert balance.balancedness(torch.ones(2, dtype=of_load)).dtype == expected
    assert balance.gpu_load(placement, halves[:2], 1).item() == halves[:2].double().sum().item()


def test_a_load_of_no_number_is_refused() -> None:
    load: Tensor = torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"load is torch\.bool; expected an integer or a floating-point dtype"):
        balance.update_correction_bias(torch.zeros(4), load, 1e-3)
