"""Laws of route, with the names of the laws in its docstring."""

import dataclasses
import itertools

import torch
from hypothesis import strategies as st
from support import assert_is_the_layer, config_with, law, logits_of, real_tokens, route, router_with
from torch import Tensor

import moe_fn
from moe_fn import reference
from moe_fn.testing import MoEProblem, assert_matches, configs, problems, weights_for

SEEDS = st.integers(0, 2**20)
PLAIN = {"correction_bias": "none", "groups": None, "selection": "top_k"}
WILD = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 1e-30, 0.0, 88.0, -104.0])


def wild_logits(problem: MoEProblem, seed: int) -> Tensor:
    """Returns logits of which some have values that overflow naive scores."""
    logits, generator = logits_of(problem), torch.Generator().manual_seed(seed)
    chosen = WILD[torch.randint(len(WILD), logits.shape, generator=generator)].to(logits.dtype)
    return torch.where(torch.rand(logits.shape, generator=generator) < 0.4, chosen, logits)


def distinct_logits(problem: MoEProblem, seed: int) -> Tensor:
    """Returns logits that are distinct multiples of 1/8 in each row."""
    shape = logits_of(problem).shape
    order = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return (order - shape[-1] // 2).to(torch.float32) / 8


@law(problems())
def test_routing_equals_the_reference(problem: MoEProblem) -> None:
    expected = reference.route(
        problem.config, problem.weights, logits_of(problem), token_ids=problem.token_ids, token_mask=problem.token_mask
    )
    actual = route(problem)
    assert_matches(actual.expert_ids, expected.expert_ids, name="expert_ids")
    assert_matches(actual.weights, expected.weights, name="weights")
    assert_matches(actual.shared_weights, expected.shared_weights, name="shared_weights")


@law(problems(configs(selection=st.sampled_from(["top_k", "sparsemixer"]))), SEEDS)
def test_ids_of_a_token_are_distinct_and_in_range(problem: MoEProblem, seed: int) -> None:
    ids = route(problem, wild_logits(problem, seed)).expert_ids[real_tokens(problem)]
    assert ((ids >= 0) & (ids < problem.config.num_choices)).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())


# The identity score is not a probability: 1e30 passes unchanged, and a norm of such values may overflow.
@law(
    problems(configs(scoring=st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])), tokens=st.integers(1, 9)), SEEDS
)
def test_weights_are_finite_and_float32(problem: MoEProblem, seed: int) -> None:
    routing = route(problem, wild_logits(problem, seed))
    assert routing.weights.dtype == torch.float32
    assert torch.isfinite(routing.weights).all()


@law(problems(configs(**PLAIN, scoring=st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])), logits="grid"))
def test_ties_go_to_the_lowest_expert_id(problem: MoEProblem) -> None:
    logits, ids = logits_of(problem)[:, : problem.config.num_choices], route(problem).expert_ids
    for row, chosen, real in zip(logits.tolist(), ids.tolist(), real_tokens(problem).tolist(), strict=True):
        if real:
            best_first = sorted(range(len(row)), key=lambda e: (-row[e], e))
            assert chosen == best_first[: len(chosen)]


@law(
    problems(
        configs(
            scoring=st.sampled_from(["softmax", "sigmoid"]),
            selection=st.sampled_from(["top_k", "hash"]),
            renormalize=True,
            renormalize_epsilon=0.0,
            renormalize_minimum=0.0,
            renormalize_order=1.0,
            shared=None,
        )
    )
)
def test_renormalized_rows_sum_to_the_scale(problem: MoEProblem) -> None:
    problem, router = router_with(problem, expert_scale=None), problem.config.router
    sums = route(problem).weights[real_tokens(problem)].sum(-1)
    expected = router.routed_scaling_factor if router.scale_on == "weights" else 1.0
    assert_matches(sums, torch.full_like(sums, expected), tolerance=1e-5)


@law(
    problems(
        configs(scoring="softmax", logit_softcap=None, selection=st.sampled_from(["top_k", "hash"])), logits="grid"
    )
)
def test_adding_a_constant_to_a_softmax_row_changes_nothing(problem: MoEProblem) -> None:
    shifted = route(problem, logits_of(problem) + 4.0)
    routing = route(problem)
    assert_matches(shifted.expert_ids, routing.expert_ids)
    assert_matches(shifted.weights, routing.weights, tolerance=1e-5)


@law(
    problems(
        configs(
            selection="top_k",
            groups=None,
            correction_bias="none",
            scoring=st.sampled_from(["softmax", "sigmoid"]),
            logit_softcap=None,
        )
    ),
    SEEDS,
)
def test_permuting_experts_permutes_ids(problem: MoEProblem, seed: int) -> None:
    choices, logits = problem.config.num_choices, distinct_logits(problem, seed)
    new_of_old = torch.randperm(choices, generator=torch.Generator().manual_seed(seed))
    old_of_new = new_of_old.argsort()
    columns = torch.cat([old_of_new, torch.arange(choices, logits.shape[-1])])
    scale = problem.weights.router.expert_scale if problem.weights.router else None
    moved = router_with(problem, expert_scale=None if scale is None else scale[columns])
    before, after = route(problem, logits), route(moved, logits[:, columns])
    ids = torch.where(before.expert_ids < 0, before.expert_ids, new_of_old[before.expert_ids])
    assert_matches(after.expert_ids, ids)
    assert_matches(after.weights, before.weights)


def grouped(**fixed: object) -> st.SearchStrategy:
    from moe_fn import GroupConfig

    groups = st.tuples(st.sampled_from([2, 3, 4]), st.integers(1, 2), st.sampled_from(["max", "top2_sum"])).map(
        lambda g: GroupConfig(count=g[0], top_k=min(g[1], g[0] - 1), score=g[2])
    )
    return configs(groups=groups, zero_experts=None, scoring="sigmoid", scoring_order="before_top_k", **fixed)


@law(problems(grouped(correction_bias="none"), logits="grid"))
def test_groups_never_chosen_contribute_nothing(problem: MoEProblem) -> None:
    config, groups = problem.config, problem.config.router.groups
    routing, logits = route(problem), logits_of(problem)[:, : config.num_choices]
    for row, ids, real in zip(logits.tolist(), routing.expert_ids.tolist(), real_tokens(problem).tolist(), strict=True):
        if not real:
            continue
        size = config.num_choices // groups.count
        z, cap = torch.tensor(row) * config.router.logit_multiplier, config.router.logit_softcap
        scores = torch.sigmoid(z if cap is None else cap * torch.tanh(z / cap)).tolist()
        best = [sorted(scores[g * size : (g + 1) * size])[::-1] for g in range(groups.count)]
        worth = [b[0] if groups.score == "max" else b[0] + b[1] for b in best]
        kept = {e // size for e in ids}
        assert len(kept) <= groups.top_k
        # Among as many groups as are kept, a group that exceeds the best of the others by more than rounding is kept
        # if it is large enough.
        threshold = sorted(worth)[::-1][groups.top_k - 1]
        assert all(worth[g] >= threshold - 1e-6 for g in kept)


BIASED = {
    "correction_bias": "scores",
    "scoring_order": "before_top_k",
    "groups": None,
    "renormalize": False,
    "shared": None,
}


@law(problems(configs(**BIASED, weight_on="output")), SEEDS)
def test_the_correction_bias_changes_the_choice_but_not_the_weights(problem: MoEProblem, seed: int) -> None:
    router, logits = dataclasses.replace(problem.config.router, correction_bias="none"), logits_of(problem)
    every = route(router_with(problem, correction_bias=None), logits, router=router, top_k=problem.config.num_choices)
    weight_of_expert = torch.zeros_like(every.weights).scatter(-1, every.expert_ids.clamp(min=0), every.weights)
    routing, real = route(problem), real_tokens(problem)
    assert_matches(routing.weights[real], weight_of_expert.gather(-1, routing.expert_ids.clamp(min=0))[real])
    pushed = router_with(
        problem, correction_bias=torch.zeros(problem.config.num_choices).index_fill(0, torch.tensor(0), 1e4)
    )
    assert (route(pushed).expert_ids[real, 0] == 0).all()


@law(problems(), SEEDS)
def test_padding_tokens_have_no_expert(problem: MoEProblem, seed: int) -> None:
    mask = torch.rand(problem.x.shape[:-1], generator=torch.Generator().manual_seed(seed)) < 0.5
    routing = route(problem.replace(token_mask=mask if problem.token_mask is None else mask & problem.token_mask))
    padding = ~(mask if problem.token_mask is None else mask & problem.token_mask).flatten()
    assert (routing.expert_ids[padding] == -1).all()
    assert (routing.weights[padding] == 0).all()
    assert (routing.expert_ids[~padding] >= 0).all()


@law(problems(configs(capacity=st.integers(1, 3))))
def test_a_capacity_keeps_the_first_slots_of_every_expert(problem: MoEProblem) -> None:
    config, capacity = problem.config, problem.config.router.capacity
    all_ids, kept = route(config_with(problem, capacity=None)).expert_ids, route(problem).expert_ids
    length = problem.x.shape[-2] or 1
    for before, after in zip(all_ids.split(length), kept.split(length), strict=True):
        room = dict.fromkeys(range(config.num_experts), capacity)
        for choice, token in itertools.product(range(config.top_k), range(len(before))):
            expert = int(before[token, choice])
            fits = room.get(expert, 1) > 0
            assert int(after[token, choice]) == (expert if fits else -1)
            if expert in room:
                room[expert] -= 1
    if len(kept):
        assert_is_the_layer(problem, problem.call(moe_fn.moe_forward))


@law(problems(configs(selection="hash")))
def test_hash_routing_ignores_how_large_the_logits_are(problem: MoEProblem) -> None:
    ids = route(problem, logits_of(problem).nan_to_num() * -3.0).expert_ids
    table = problem.weights.router.expert_ids_of_token
    assert_matches(ids[real_tokens(problem)], table[problem.token_ids.flatten()][real_tokens(problem)])


def test_gradients_stay_finite_where_scores_vanish() -> None:
    for scoring in ("softmax", "sigmoid", "sqrtsoftplus"):
        config = moe_fn.MoEConfig(
            num_experts=3,
            top_k=2,
            hidden_size=1,
            intermediate_size=1,
            router=moe_fn.RouterConfig(scoring=scoring, renormalize=False),
        )
        logits = torch.tensor([[-200.0, -150.0, 3.0], [-1e4, -1e4, -1e4]], requires_grad=True)
        moe_fn.route(config, weights_for(config), logits).weights.sum().backward()
        assert logits.grad is not None and torch.isfinite(logits.grad).all(), scoring
