"""Laws of NaN and infinity in `moe_fn.moe_forward`: which outputs they reach, and that they are not lost."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import law, logits_of, route, with_gradients
from test_native import ACTIVATIONS, RUNNABLE
from test_native import call as native_call
from test_native import problem as native_problem
from test_quant import problems_of
from torch import Tensor

import moe_fn
from moe_fn import MoEConfig, Routing
from moe_fn.testing import MoEProblem, assert_matches, configs, problems, quants

SEEDS = st.integers(0, 2**20)
VALUES = st.sampled_from([float("nan"), float("inf"), float("-inf")])
CODED = quants().flatmap(problems_of)
PROBLEMS = st.one_of(problems(), problems(dtype=torch.bfloat16), CODED)


def with_logits(problem: MoEProblem) -> MoEProblem:
    """Returns the problem with given logits, so that the gate does not read x; rejects inputs rounded by one scale for
    all tokens.
    """
    quant = problem.config.quant
    inputs = None if quant is None else quant.activations
    assume(inputs is None or inputs.granularity != "tensor" or inputs.static)
    logits = logits_of(problem)
    return problem.replace(logits=logits.view(*problem.x.shape[:-1], logits.shape[-1]))


def hits(problem: MoEProblem, seed: int) -> Tensor:
    """Returns a mask of tokens that get a non-finite value: bool [...]."""
    return torch.rand(problem.x.shape[:-1], generator=torch.Generator().manual_seed(seed)) < 0.4


def spoiled(problem: MoEProblem, hit: Tensor, value: float, seed: int) -> MoEProblem:
    """Returns the problem with `value` in one column of the masked tokens."""
    column = torch.arange(problem.x.shape[-1]) == seed % problem.x.shape[-1]
    return problem.replace(x=torch.where(hit.unsqueeze(-1) & column, value, problem.x))


def with_experts(problem: MoEProblem, routing: Routing) -> Tensor:
    """Returns a mask of tokens with at least one routed expert: bool [...]."""
    ids = routing.expert_ids
    return ((ids >= 0) & (ids < problem.config.num_experts)).any(-1).view(problem.x.shape[:-1])


def experts_of(problem: MoEProblem, routing: Routing, tokens: Tensor) -> Tensor:
    """Returns a mask of experts that have some of these tokens: bool [E]."""
    ids = routing.expert_ids[tokens.flatten()]
    return (ids.unsqueeze(-1) == torch.arange(problem.config.num_experts)).flatten(0, -2).any(0)


@settings(max_examples=30)
@law(PROBLEMS, SEEDS, VALUES)
def test_non_finite_values_of_a_token_affect_no_other_token(problem: MoEProblem, seed: int, value: float) -> None:
    problem = with_logits(problem)
    hit = hits(problem, seed)
    dirty, clean = spoiled(problem, hit, value, seed), spoiled(problem, hit, 0.0, seed)
    assert_matches(dirty.call(moe_fn.moe_forward)[~hit], clean.call(moe_fn.moe_forward)[~hit], tolerance=0.0)


@settings(max_examples=30)
@law(PROBLEMS, SEEDS)
def test_nan_in_a_token_is_nan_in_its_output(problem: MoEProblem, seed: int) -> None:
    problem = with_logits(problem)
    seen = hits(problem, seed) & with_experts(problem, route(problem))
    y = spoiled(problem, seen, float("nan"), seed).call(moe_fn.moe_forward)
    assert torch.isnan(y[seen]).all()


@settings(max_examples=30)
@law(PROBLEMS, SEEDS, VALUES)
def test_non_finite_weights_of_an_expert_affect_only_its_tokens(problem: MoEProblem, seed: int, value: float) -> None:
    problem = with_logits(problem)
    expert = seed % problem.config.num_experts
    routing = route(problem)
    away = ~(routing.expert_ids == expert).any(-1).view(problem.x.shape[:-1])
    y, expected = (with_expert(problem, expert, bad).call(moe_fn.moe_forward) for bad in (value, None))
    assert_matches(y[away], expected[away], tolerance=0.0)


def with_expert(problem: MoEProblem, expert: int, value: float | None) -> MoEProblem:
    """Returns the problem with all weights, or scales, of an expert set to `value`; None leaves them."""
    if value is None:
        return problem
    weights, quant = problem.weights, problem.weights.quant

    def bad(t: Tensor) -> Tensor:
        return torch.where(torch.arange(t.shape[0]).view(-1, *[1] * (t.ndim - 1)) == expert, value, t)

    if quant is None:
        return problem.replace(
            weights=dataclasses.replace(weights, gate_up=bad(weights.gate_up), down=bad(weights.down))
        )
    assume(quant.down_scale is not None and quant.down_scale.itemsize > 1)
    changed = dataclasses.replace(quant, gate_up_scale=bad(quant.gate_up_scale), down_scale=bad(quant.down_scale))  # type: ignore[arg-type]
    return problem.replace(weights=dataclasses.replace(weights, quant=changed))


@settings(max_examples=30)
@law(problems(), SEEDS, VALUES)
def test_non_finite_values_do_not_reach_gradients_of_other_tokens(problem: MoEProblem, seed: int, value: float) -> None:
    problem = with_logits(problem)
    hit = hits(problem, seed)
    away = ~experts_of(problem, route(problem), hit)
    dirty, clean = (gradients_of(spoiled(problem, hit, v, seed)) for v in (value, 0.0))
    assert_matches(dirty[0][~hit], clean[0][~hit], tolerance=1e-6, scale=0.1)
    for of_dirty, of_clean in zip(dirty[1:], clean[1:], strict=True):
        assert_matches(of_dirty[away], of_clean[away], tolerance=1e-6, scale=0.1)


def gradients_of(problem: MoEProblem) -> list[Any]:
    """Returns the gradients of x, gate_up and down, for a random gradient of the output."""
    problem = with_gradients(problem)
    y = problem.call(moe_fn.moe_forward)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    inputs = [problem.x, problem.weights.gate_up, problem.weights.down]
    if not y.requires_grad:
        return [torch.zeros_like(t) for t in inputs]
    found = torch.autograd.grad(y, inputs, direction, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]


@pytest.mark.parametrize(
    "check",
    [test_non_finite_values_of_a_token_affect_no_other_token, test_nan_in_a_token_is_nan_in_its_output],
    ids=lambda t: t.__name__,
)
def test_the_torch_back_end_keeps_these_laws_too(check: Any) -> None:
    given_problems = given(problems(configs(backend="torch")), *check.strategies[1:])
    settings(max_examples=20)(given_problems(check.check))()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", RUNNABLE)
def test_every_level_keeps_nan_where_it_is(level: str, dtype: torch.dtype, activation: Any) -> None:
    """Vector comparisons may drop NaN: one of 7 tokens in a tile is NaN."""
    config = MoEConfig(num_experts=2, top_k=2, hidden_size=34, intermediate_size=18, activation=activation)
    weights, x, routing = native_problem(config, 7, dtype, 0)
    routing = dataclasses.replace(routing, expert_ids=torch.tensor([[0, 1]]).expand(7, 2).contiguous())
    expected = native_call(level, config, weights, x, routing)
    for value in (float("nan"), float("inf")):
        y = native_call(
            level,
            config,
            weights,
            x.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(value, dtype=dtype)),
            routing,
        )
        others = torch.arange(7) != 3
        assert torch.equal(y[others], expected[others])
        assert torch.isnan(y[3]).all() or value == float("inf")
