"""Laws of route_to, which routes to given ids: those of a run in another precision, on another back-end, or before
activation checkpointing.
"""

import dataclasses
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from support import flat, law, logits_of, real_tokens, route
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moe_fn
from moe_fn import MoEConfig, Routing, reference
from moe_fn.records import RouterWeights
from moe_fn.testing import MoEProblem, assert_matches, configs, problems, weights_for

SEEDS = st.integers(0, 2**20)
CHOOSES = {"selection": st.sampled_from(["top_k", "top_k", "hash"]), "capacity": None}


def replayed(problem: MoEProblem, logits: Tensor, ids: Tensor) -> Routing:
    return moe_fn.route_to(problem.config, problem.weights, logits, ids, token_mask=flat(problem.token_mask))


def zero_may_win(config: MoEConfig) -> bool:
    """Whether an expert outside of the kept groups may be chosen, the exception in route_to's docstring."""
    groups = config.router.groups
    return groups is not None and groups.fill == "zero" and config.router.correction_bias == "none"


@law(problems(configs(**CHOOSES)), SEEDS)
def test_routing_to_its_own_choice_gives_the_routing(problem: MoEProblem, seed: int) -> None:
    assume(not zero_may_win(problem.config))
    found = []
    for of_ids in (False, True):
        logits = logits_of(problem).detach().clone().requires_grad_()
        routing = route(problem, logits)
        routing = replayed(problem, logits, routing.expert_ids) if of_ids else routing
        parts = [w for w in (routing.weights, routing.shared_weights) if w is not None]
        generator = torch.Generator().manual_seed(seed)
        total = sum((w * torch.rand(w.shape, generator=generator)).sum() for w in parts)
        (gradient,) = torch.autograd.grad(total, logits, allow_unused=True)  # type: ignore[arg-type]
        found.append((routing, torch.zeros_like(logits) if gradient is None else gradient))
    (own, of_logits), (again, of_logits_again) = found
    assert again.weights.dtype == own.weights.dtype and again.expert_ids.dtype == own.expert_ids.dtype
    assert torch.equal(again.expert_ids, own.expert_ids)
    # The op that routes on a CPU has the bits of a batch-invariant softmax; replayed weights come from the stage.
    tolerance = 0.0 if problem.config.batch_invariant else 1e-6
    torch.testing.assert_close(again.weights, own.weights, rtol=tolerance, atol=0.0)
    assert own.shared_weights is None or torch.equal(again.shared_weights, own.shared_weights)  # type: ignore[arg-type]
    real = real_tokens(problem)
    assert torch.equal(of_logits_again[real], of_logits[real])


def by_table(problem: MoEProblem, ids: Tensor) -> MoEProblem:
    """Returns the problem with given ids for the reference: a hash table with a row for each token."""
    plain = {"selection": "hash", "correction_bias": "none", "groups": None}
    config = dataclasses.replace(problem.config, router=dataclasses.replace(problem.config.router, **plain))
    router = dataclasses.replace(
        problem.weights.router or RouterWeights(), expert_ids_of_token=ids, correction_bias=None
    )
    weights, token_ids = (
        dataclasses.replace(problem.weights, router=router),
        torch.arange(len(ids)).view(problem.x.shape[:-1]),
    )
    return problem.replace(config=config, weights=weights, token_ids=token_ids)


@law(problems(configs(**CHOOSES)), SEEDS)
def test_routing_to_any_choice_equals_the_reference(problem: MoEProblem, seed: int) -> None:
    config, generator = problem.config, torch.Generator().manual_seed(seed)
    tokens = problem.x[..., 0].numel()
    order = torch.rand(tokens, config.num_choices, generator=generator).argsort(-1)[:, : config.top_k]
    ids = torch.where(torch.rand(order.shape, generator=generator) < 0.2, -1, order)
    logits = logits_of(problem)
    other = by_table(problem, ids)
    expected = reference.route(
        other.config, other.weights, logits, token_ids=flat(other.token_ids), token_mask=flat(problem.token_mask)
    )
    actual = replayed(problem, logits, ids.to(torch.int16))
    assert_matches(actual.expert_ids, expected.expert_ids, name="expert_ids")
    assert_matches(actual.weights, expected.weights, name="weights")
    assert_matches(actual.shared_weights, expected.shared_weights, name="shared_weights")


def test_a_capacity_that_drops_slots_is_replayed_with_the_slots_dropped() -> None:
    router = moe_fn.RouterConfig(capacity=2, renormalize=False)
    config = MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=6, router=router)
    weights, logits = weights_for(config), torch.randn(9, 4)
    routing = moe_fn.route(config, weights, logits)
    again = moe_fn.route_to(config, weights, logits, routing.expert_ids)
    assert (routing.expert_ids == -1).any()
    assert torch.equal(again.expert_ids, routing.expert_ids) and torch.equal(again.weights, routing.weights)


@pytest.mark.parametrize("scoring_order", ["before_top_k", "after_top_k"])
def test_a_token_of_no_expert_has_finite_gradients(scoring_order: str) -> None:
    router = moe_fn.RouterConfig(scoring_order=scoring_order)  # type: ignore[arg-type]
    config = MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=6, router=router)
    logits = torch.randn(3, 4, requires_grad=True)
    routing = moe_fn.route_to(
        config, weights_for(config, scales=False), logits, torch.tensor([[-1, 4], [2, -1], [0, 3]])
    )
    routing.weights[:, 1].sum().backward()
    assert routing.expert_ids[0].tolist() == [-1, -1]  # 4 is the id of no expert, as in moe_forward_routed
    assert routing.weights[0].tolist() == [0, 0] and routing.weights[1].tolist() == [1, 0]
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert (logits.grad[0] == 0).all() and (logits.grad[2] != 0).any()


def rollout_and_trainer(dtype: torch.dtype) -> tuple[MoEConfig, moe_fn.MoEWeights, Tensor, Tensor]:
    """Returns a layer, an input, and the ids that a run in another dtype chose for it."""
    config = MoEConfig(num_experts=16, top_k=4, hidden_size=32, intermediate_size=16)
    weights = weights_for(config, torch.Generator().manual_seed(0))
    x = torch.randn(4, 100, 32, generator=torch.Generator().manual_seed(1))
    low = torch.utils._pytree.tree_map(lambda t: t.to(dtype), weights)
    stats = moe_fn.moe_forward_with_stats(config, low, x.to(dtype))[1]
    return config, weights, x, stats.expert_ids.view(4, 100, 4)


def test_the_ids_of_a_run_in_bfloat16_and_the_gradients_of_the_router() -> None:
    config, weights, x, ids = rollout_and_trainer(torch.bfloat16)
    gate = weights.router.gate.requires_grad_()  # type: ignore[union-attr]
    logits, own = moe_fn.moe_route(config, weights, x)
    routing = moe_fn.route_to(config, weights, logits, ids)
    differ = (own.expert_ids.sort(-1).values != ids.sort(-1).values).any(-1)
    assert 0 < differ.float().mean() < 0.5  # otherwise there is nothing to replay
    y = moe_fn.moe_forward_routed(config, weights, x, routing)
    assert torch.equal(routing.expert_ids, ids)
    assert not torch.equal(y[differ], moe_fn.moe_forward(config, weights, x)[differ])
    (of_gate,) = torch.autograd.grad(y.square().sum(), gate)
    assert torch.isfinite(of_gate).all() and of_gate.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_recomputes_with_the_ids_of_its_forward(reentrant: bool) -> None:
    config, weights, x, ids = rollout_and_trainer(torch.bfloat16)
    x.requires_grad_()

    def layer(x: Tensor) -> Tensor:
        logits, _ = moe_fn.moe_route(config, weights, x)
        return moe_fn.moe_forward_routed(config, weights, x, moe_fn.route_to(config, weights, logits, ids))

    plain = layer(x)
    kept = checkpoint(layer, x, use_reentrant=reentrant)
    assert torch.equal(kept, plain)
    (expected,) = torch.autograd.grad(plain.square().sum(), x)
    kept.square().sum().backward()
    assert torch.equal(x.grad, expected)  # type: ignore[arg-type]


def test_the_example_shows_that_replay_takes_the_mismatch_away() -> None:
    place = Path(moe_fn.__file__).parents[1] / "examples" / "replay.py"
    if not place.exists():
        pytest.skip("installed without the repository")
    example = runpy.run_path(str(place))
    for int8 in (False, True):
        for _, differ, own, again in example["learn"](2, int8, replay=True, show=0):
            assert 0 < differ < 0.5
            assert again.k3 < own.k3 / 10
            assert own.least < again.least < 1 < again.largest < own.largest
