"""Laws of combine, alone and after dispatch."""

import dataclasses

import torch
from hypothesis import strategies as st
from support import law

import moe_fn
from moe_fn import MoEConfig, Routing
from moe_fn.testing import assert_matches, configs, routings

Case = tuple[MoEConfig, Routing]
CASES = configs(weight_on="output").flatmap(lambda config: st.tuples(st.just(config), routings(config)))
WIDTH = 3


def rows_for(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(case[1].expert_ids.numel())
    return torch.randn(case[1].expert_ids.numel(), WIDTH, generator=generator)


@law(CASES)
def test_combine_is_linear_in_the_routing_weights(case: Case) -> None:
    config, routing = case
    rows, d = rows_for(case), moe_fn.dispatch(config, torch.zeros(len(routing.weights), WIDTH), routing)

    def combined(weights: torch.Tensor) -> torch.Tensor:
        return moe_fn.combine(config, rows, d, dataclasses.replace(routing, weights=weights))

    other = routing.weights.flip(0)
    expected = 2 * combined(routing.weights) - 3 * combined(other)
    assert_matches(combined(2 * routing.weights - 3 * other), expected, tolerance=1e-5, scale=1.0)
    ones = combined(torch.ones_like(routing.weights))
    assert_matches(combined(torch.full_like(routing.weights, 0.5)), ones / 2)


@law(CASES)
def test_slots_of_no_expert_contribute_nothing_even_nan(case: Case) -> None:
    config, routing = case
    rows, d = rows_for(case), moe_fn.dispatch(config, torch.zeros(len(routing.weights), WIDTH), routing)
    garbage = rows.clone()
    garbage[int(d.expert_ends[-1]) :] = torch.nan
    wild = torch.where(routing.expert_ids < 0, torch.inf, routing.weights)
    expected = moe_fn.combine(config, rows, d, routing)
    assert_matches(
        moe_fn.combine(config, garbage, d, dataclasses.replace(routing, weights=wild)), expected, tolerance=0.0
    )
    without_expert = ((routing.expert_ids < 0) | (routing.expert_ids >= config.num_experts)).all(-1)
    assert (expected[without_expert] == 0).all()


@law(CASES)
def test_combine_undoes_dispatch(case: Case) -> None:
    config, routing = case
    x = torch.randn(len(routing.weights), WIDTH, generator=torch.Generator().manual_seed(0))
    d = moe_fn.dispatch(config, x, routing)
    there = (routing.expert_ids >= 0) & (routing.expert_ids < config.num_experts)
    share = torch.where(there, 1 / there.sum(-1, keepdim=True).clamp(min=1), 0)
    y = moe_fn.combine(config, d.rows, d, dataclasses.replace(routing, weights=share))
    assert_matches(y, torch.where(there.any(-1, keepdim=True), x, 0))
