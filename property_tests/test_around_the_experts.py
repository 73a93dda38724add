"""Laws of shared and zero experts, transforms of input and output, the scale on the output, and truncation."""

import dataclasses

import pytest
import torch
from hypothesis import strategies as st
from support import assert_is_the_layer, config_with, gradients, law, real_tokens
from torch import Tensor

import moe_fn
from moe_fn import (
    LatentConfig,
    LatentWeights,
    LoRAConfig,
    MoEConfig,
    MoEWeights,
    NormsConfig,
    ParallelConfig,
    RankGroup,
    SharedExpertsConfig,
    ZeroExpertsConfig,
)
from moe_fn.config import ExpertNormConfig
from moe_fn.stages.route import router_logits
from moe_fn.testing import MoEProblem, assert_matches, configs, problems, weights_for

LATENT = st.builds(LatentConfig, size=st.integers(1, 5))
SHARED = st.builds(SharedExpertsConfig, intermediate_size=st.integers(1, 5), gate=st.sampled_from(["none", "sigmoid"]))


def shared_output(problem: MoEProblem) -> Tensor:
    output: Tensor = problem.call(moe_fn.moe_forward_shared)[0]
    return output


@law(problems(configs(latent=LATENT, shared=SHARED, gate_input="original")))
def test_shared_experts_see_the_original_input(problem: MoEProblem) -> None:
    latent = problem.weights.latent
    assert latent is not None
    other = dataclasses.replace(latent, input=torch.zeros_like(latent.input))
    changed = problem.replace(weights=dataclasses.replace(problem.weights, latent=other))
    assert_matches(shared_output(changed), shared_output(problem), tolerance=0.0)
    real = real_tokens(problem)
    if problem.weights.shared is not None and bool(real.any()):
        assert shared_output(problem).shape == problem.x.shape


@law(
    problems(
        configs(
            shared=st.builds(
                SharedExpertsConfig, intermediate_size=st.just(4), gate=st.sampled_from(["none", "sigmoid"])
            )
        )
    )
)
def test_several_shared_experts_are_the_sum_of_single_ones(problem: MoEProblem) -> None:
    shared = problem.weights.shared
    assert shared is not None
    shared = dataclasses.replace(shared, down_bias=None)
    half = dataclasses.replace(problem.config.shared, intermediate_size=2)

    def output(first: int, last: int, config: SharedExpertsConfig) -> Tensor:
        columns = torch.cat([torch.arange(first, last), torch.arange(first + 4, last + 4)])
        bias = None if shared.gate_up_bias is None else shared.gate_up_bias[columns]
        part = dataclasses.replace(
            shared, gate_up=shared.gate_up[columns], gate_up_bias=bias, down=shared.down[:, first:last]
        )
        weights = dataclasses.replace(problem.weights, shared=part)
        return shared_output(config_with(problem, shared=config).replace(weights=weights))

    assert_matches(output(0, 4, problem.config.shared), output(0, 2, half) + output(2, 4, half), scale=0.1)


@law(problems(configs(expert_norm=None, hidden_padding=0, gate_input="original")), st.integers(1, 3))
def test_padding_the_hidden_dimension_changes_nothing(problem: MoEProblem, padding: int) -> None:
    config, weights = problem.config, problem.weights
    hidden_dim = 2 if config.weight_layout == "out_in" else 1

    def widened(t: Tensor | None, dim: int) -> Tensor | None:
        if t is None:
            return None
        shape = list(t.shape)
        shape[dim] = padding
        return torch.cat([t, torch.randn(shape, generator=torch.Generator().manual_seed(1))], dim)

    wider = dataclasses.replace(
        weights,
        gate_up=widened(weights.gate_up, hidden_dim),
        down=widened(weights.down, 3 - hidden_dim),
        down_bias=widened(weights.down_bias, 1),
    )
    padded = config_with(problem, hidden_padding=padding).replace(weights=wider)
    assert_matches(padded.call(moe_fn.moe_forward), problem.call(moe_fn.moe_forward), scale=0.1)


@law(problems(configs(latent=None, gate_input="original")))
def test_an_identity_latent_space_changes_nothing(problem: MoEProblem) -> None:
    hidden = problem.config.hidden_size
    weights = dataclasses.replace(
        problem.weights, latent=LatentWeights(input=torch.eye(hidden), output=torch.eye(hidden))
    )
    latent = config_with(problem, latent=LatentConfig(size=hidden)).replace(weights=weights)
    assert_matches(latent.call(moe_fn.moe_forward), problem.call(moe_fn.moe_forward), scale=0.1)


NORMS = [
    NormsConfig(epsilon=0.1, input=True),
    NormsConfig(epsilon=0.5, output=True),
    NormsConfig(epsilon=0.1, input=True, output=True),
]


@law(problems(configs(norms=st.sampled_from(NORMS), backend="auto"), logits="grid"))
def test_norms_around_the_layer_equal_the_reference(problem: MoEProblem) -> None:
    assert_is_the_layer(problem, problem.call(moe_fn.moe_forward))
    direction = torch.randn(problem.x.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    actual, expected = (gradients(problem, f, direction) for f in (moe_fn.moe_forward, moe_fn.reference.moe_forward))
    assert_matches(actual, expected, tolerance=2e-5, scale=1.0)


def test_a_norm_of_numbers_that_cancelled_makes_their_rounding_large_and_the_layer_stays_within_its_bound() -> None:
    config = MoEConfig(
        num_experts=1,
        top_k=1,
        hidden_size=1,
        intermediate_size=3,
        activation="relu_no_mul",
        expert_norm=ExpertNormConfig(epsilon=0.01),
    )
    ups, downs = torch.full((1, 3, 1), 1 / 3), torch.full((1, 1, 3), 10.0)
    weights = MoEWeights(gate_up=ups, down=downs, down_bias=torch.tensor([[-10.0]]), expert_norm=torch.ones(1, 1))
    problem = MoEProblem(
        config=config, weights=weights, x=torch.linspace(0.999, 1.001, 64).unsqueeze(1), logits=torch.zeros(64, 1)
    )
    y = problem.call(moe_fn.moe_forward)
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_matches(y, problem.call(moe_fn.reference.moe_forward), scale=0.1)
    assert_is_the_layer(problem, y)
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_is_the_layer(problem, y * 1.02)


@law(problems(configs(gate_input="original"), logits="gate"))
def test_a_norm_for_the_gate_equals_a_gate_on_normed_inputs(problem: MoEProblem) -> None:
    normed = config_with(problem, norms=NormsConfig(epsilon=0.1, gate=True))
    x = moe_fn.layer.compose.without_padding(problem.x, problem.token_mask)
    seen = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1)
    logits = router_logits(problem.config, problem.weights, seen.flatten(0, -2))
    given = problem.replace(logits=logits.view(*x.shape[:-1], problem.config.num_logits))
    assert_matches(normed.call(moe_fn.moe_forward), given.call(moe_fn.moe_forward), scale=0.1)


ON_OUTPUT = {"routed_scaling_factor": 2.5, "zero_experts": None, "latent": None}


@law(problems(configs(**ON_OUTPUT, scale_on=st.sampled_from(["output", "output_float16_safe"]), weight_on="output")))
def test_a_scale_on_the_output_equals_a_scale_on_the_weights(problem: MoEProblem) -> None:
    if problem.config.shared is not None and problem.config.shared.gate == "router":
        problem = config_with(problem, shared=None).replace(weights=dataclasses.replace(problem.weights, shared=None))
        keep = problem.config.num_choices
        router = problem.weights.router
        if problem.logits is None and router is not None:
            router = dataclasses.replace(
                router, gate=router.gate[:keep], bias=None if router.bias is None else router.bias[:keep]
            )
        else:
            problem = problem.replace(logits=problem.logits[..., :keep])
            router = None if router is None else dataclasses.replace(router, gate=None, bias=None)
        if router is not None and router.expert_scale is not None:
            router = dataclasses.replace(router, expert_scale=router.expert_scale[:keep])
        problem = problem.replace(weights=dataclasses.replace(problem.weights, router=router))
    expected = config_with(problem, scale_on="weights").call(moe_fn.moe_forward)
    assert_matches(problem.call(moe_fn.moe_forward), expected, scale=0.1)


@law(
    problems(
        configs(
            **ON_OUTPUT, shared=SHARED, scale_on="output_float16_safe", score_dtype="float32", gate_dtype="float32"
        ),
        dtype=torch.float16,
    )
)
def test_the_float16_rule_divides_the_whole_layer_by_the_scale(problem: MoEProblem) -> None:
    whole = config_with(problem, scale_on="output").call(moe_fn.moe_forward)
    divided = problem.call(moe_fn.moe_forward)
    assert_matches(divided.to(torch.float32), whole.to(torch.float32) / 2.5, tolerance=1e-2, scale=0.1)


@law(problems(configs(shared=SHARED, zero_experts=None)))
def test_an_average_is_half_of_a_sum(problem: MoEProblem) -> None:
    average = dataclasses.replace(problem.config.shared, combine="average")
    halved = config_with(problem, shared=average).call(moe_fn.moe_forward)
    assert_matches(halved, problem.call(moe_fn.moe_forward) / 2, scale=0.1)


@law(st.integers(0, 5), st.integers(1, 6), st.integers(0, 3))
def test_without_a_group_only_padding_columns_are_cut(tokens: int, width: int, extra: int) -> None:
    y = torch.randn(tokens, width + extra, generator=torch.Generator().manual_seed(tokens))
    assert torch.equal(moe_fn.reduce_and_trunc(y, width=width), y[:, :width])
    assert torch.equal(moe_fn.reduce_and_trunc(y), y)


def zero_case(kind: str) -> st.SearchStrategy[MoEProblem]:
    zeros = st.integers(1, 3).map(lambda count: ZeroExpertsConfig(count=count, kind=kind))
    return problems(configs(zero_experts=zeros, weight_on="output", num_experts=st.integers(1, 4)))


def split(problem: MoEProblem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (layer with zero experts, layer without their slots, their ids with -1 for others, their weights)."""
    call = moe_fn.layer.call.check_and_flatten(
        "test", problem.config, problem.weights, problem.x, problem.logits, problem.token_ids, problem.token_mask
    )
    config: MoEConfig = problem.config
    _, routing = moe_fn.forward._route(config, call)
    is_zero = routing.expert_ids >= config.num_experts
    without = dataclasses.replace(routing, expert_ids=torch.where(is_zero, -1, routing.expert_ids))
    y = moe_fn.moe_forward_routed(config, problem.weights, call.x, routing)
    rest = moe_fn.moe_forward_routed(config, problem.weights, call.x, without)
    ids = torch.where(is_zero, routing.expert_ids - config.num_experts, -1)
    return y, rest, ids, torch.where(is_zero, routing.weights, 0)


@law(zero_case("identity"))
def test_identity_experts_add_their_weight_times_the_input(problem: MoEProblem) -> None:
    y, rest, _, w = split(problem)
    x = moe_fn.layer.compose.without_padding(problem.x, problem.token_mask).view(-1, problem.config.hidden_size)
    assert_matches(y, rest + w.sum(-1, keepdim=True) * x, scale=0.1)


@law(zero_case("zero"))
def test_zero_experts_cost_nothing_and_add_nothing(problem: MoEProblem) -> None:
    y, rest, ids, _ = split(problem)
    assert_matches(y, rest, tolerance=0.0)
    routing = moe_fn.Routing(
        expert_ids=torch.where(ids >= 0, ids + problem.config.num_experts, 0),
        weights=torch.ones_like(ids, dtype=torch.float32),
    )
    x = torch.zeros(len(ids), problem.config.expert_hidden_size)
    dispatched = moe_fn.dispatch(problem.config, x, routing)
    assert int(dispatched.expert_ends[-1]) == int((ids < 0).sum())


@law(zero_case("constant"))
def test_constant_experts_add_their_weight_times_their_vector(problem: MoEProblem) -> None:
    y, rest, ids, w = split(problem)
    constants = problem.weights.constants
    assert constants is not None
    added = (torch.where(ids >= 0, w, 0).unsqueeze(-1) * constants[ids.clamp(min=0)]).sum(1)
    assert_matches(y, rest + added, scale=0.1)


def ranks_of(name: str, size: int) -> list[RankGroup]:
    return [RankGroup(name=name, size=size, rank=rank) for rank in range(size)]


@law(
    configs(num_experts=st.integers(3, 6), intermediate_size=st.sampled_from([4, 8]), chunk_tokens=None, opaque=False,
    expert_norm=None,
            shared=st.sampled_from([None, SharedExpertsConfig(intermediate_size=4, count=2)]),
            lora=st.sampled_from([None, LoRAConfig(num_adapters=2, rank=3),
            LoRAConfig(num_adapters=1, rank=2, experts="outer_shared")])),
    st.sampled_from(["linear", "round_robin", (1, 0, 1)]),
    st.integers(1, 2),
)  # fmt: skip
def test_joining_undoes_sharding(config: MoEConfig, placement: str | tuple[int, ...], slices: int) -> None:
    if isinstance(placement, tuple):
        placement = tuple(placement[expert % 3] for expert in range(config.num_experts))
    parallels = [
        ParallelConfig(ep=ep, tp=tp if slices > 1 else None, placement=placement)
        for ep in ranks_of("0", 2)
        for tp in ranks_of("1", slices)
    ]
    shared_configs = [dataclasses.replace(config, parallel=parallel) for parallel in parallels]
    weights = weights_for(config)
    shards = [moe_fn.shard_weights(each, weights) for each in shared_configs]
    joined = moe_fn.join_weights(shared_configs[::-1], shards[::-1])
    assert_matches(joined, weights, tolerance=0.0)
    for each, shard in zip(shared_configs, shards, strict=True):
        assert shard.gate_up.shape[0] == each.own.num_experts and shard.down.shape[0] == each.own.num_experts
