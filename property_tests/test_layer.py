"""Laws of the whole layer: values and gradients."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from support import (
    assert_is_the_layer,
    config_with,
    flat,
    gradients,
    law,
    leaves,
    logits_of,
    real_tokens,
    with_gradients,
)
from torch import Tensor
from torch.utils._pytree import tree_map

import moe_fn
from moe_fn import MoEConfig, MoEWeights, RouterWeights, Routing, reference
from moe_fn.testing import MoEProblem, assert_matches, configs, problems, routings, weights_for

SEEDS = st.integers(0, 2**20)


def forward(problem: MoEProblem) -> Tensor:
    y: Tensor = problem.call(moe_fn.moe_forward)
    return y


def direction_of(problem: MoEProblem) -> Tensor:
    """Returns the factors of the output in a loss, so that gradients differ between elements."""
    return torch.randn(problem.x.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def assert_same_function(problem: MoEProblem, other: MoEProblem) -> None:
    """Checks that both problems have the same output and the same gradients."""
    assert_is_the_layer(problem, forward(problem), forward(other))
    direction = direction_of(problem)
    actual, expected = (gradients(p, moe_fn.moe_forward, direction) for p in (problem, other))
    assert_matches(actual, expected, tolerance=1e-5, scale=0.1)


@law(problems())
def test_the_layer_equals_the_reference(problem: MoEProblem) -> None:
    assert_is_the_layer(problem, forward(problem))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_layer_equals_the_reference_in_every_dtype(dtype: torch.dtype) -> None:
    # Terms are as large as the largest routed scale that is drawn, times x near 1, and may cancel.
    @law(problems(dtype=dtype))
    def check(problem: MoEProblem) -> None:
        assert_is_the_layer(problem, forward(problem), scale=2.5)

    check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["silu", "swigluoai", "relu2_no_mul"])
def test_errors_at_real_widths_stay_within_the_table(dtype: torch.dtype, activation: Any) -> None:
    config = MoEConfig(num_experts=8, top_k=3, hidden_size=512, intermediate_size=256, activation=activation)
    weights = weights_for(config, seed=1, dtype=dtype)
    x, logits = (torch.randn(24, width, generator=torch.Generator().manual_seed(2)).to(dtype) for width in (512, 8))
    assert_matches(moe_fn.moe_forward(config, weights, x, logits), reference.moe_forward(config, weights, x, logits))


@law(problems())
def test_gradients_equal_the_reference(problem: MoEProblem) -> None:
    direction = direction_of(problem)
    actual, expected = (
        gradients(problem, function, direction) for function in (moe_fn.moe_forward, reference.moe_forward)
    )
    for a, e in zip(actual, expected, strict=True):
        finite = torch.isfinite(e)  # the derivative of a NaN logit is undefined
        assert_matches(a[finite], e[finite].to(a.dtype), tolerance=1e-5, scale=0.1)


@law(problems(), SEEDS)
def test_the_layer_commutes_with_permuting_tokens(problem: MoEProblem, seed: int) -> None:
    tokens = torch.arange(problem.x[..., 0].numel())
    order = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]
    y = forward(problem.of_tokens(tokens))
    assert_is_the_layer(problem.of_tokens(order), forward(problem.of_tokens(order)), y[order])


@law(
    problems(
        configs(selection="top_k", groups=None, zero_experts=None, shared=None, correction_bias="none"), logits="grid"
    ),
    SEEDS,
)
def test_relabelling_experts_changes_nothing(problem: MoEProblem, seed: int) -> None:
    config, weights, choices = problem.config, problem.weights, problem.config.num_choices
    order = torch.randperm(choices, generator=torch.Generator().manual_seed(seed))
    distinct = (
        torch.rand(problem.x.shape[:-1] + (choices,), generator=torch.Generator().manual_seed(seed)).argsort(-1) / 8
    )
    names = ("gate_up", "down", "gate_up_bias", "down_bias", "expert_norm")
    relabelled = {name: getattr(weights, name)[order] for name in names if getattr(weights, name) is not None}
    scale = weights.router.expert_scale if weights.router else None
    router = RouterWeights(expert_scale=None if scale is None else scale[order])
    before = problem.replace(
        logits=distinct, weights=dataclasses.replace(weights, router=RouterWeights(expert_scale=scale))
    )
    after = before.replace(
        logits=distinct[..., order], weights=dataclasses.replace(weights, **relabelled, router=router)
    )
    assert config == after.config
    assert_matches(forward(after), forward(before), scale=0.1)


@law(problems(), SEEDS)
def test_concatenated_batches_give_concatenated_outputs(problem: MoEProblem, seed: int) -> None:
    tokens = torch.arange(problem.x[..., 0].numel())
    cut = seed % (len(tokens) + 1)
    parts = [forward(problem.of_tokens(part)) for part in (tokens[:cut], tokens[cut:])]
    assert_is_the_layer(problem.of_tokens(tokens), torch.cat(parts), forward(problem.of_tokens(tokens)))


@law(problems())
def test_routing_and_then_the_routed_layer_give_the_layer(problem: MoEProblem) -> None:
    logits, routing = problem.call(moe_fn.moe_route)
    assert logits.shape == (*problem.x.shape[:-1], problem.config.num_logits)
    y = moe_fn.moe_forward_routed(problem.config, problem.weights, problem.x, routing, token_mask=problem.token_mask)
    assert_matches(y, forward(problem), scale=0.1)


ROUTED = configs(weight_on="output", opaque=st.booleans()).flatmap(
    lambda config: st.tuples(st.just(config), routings(config), SEEDS)
)
RoutedCase = tuple[MoEConfig, Routing, int]


def routed_parts(case: RoutedCase) -> tuple[MoEConfig, MoEWeights, Tensor, Routing]:
    config, routing, seed = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(routing.expert_ids), config.hidden_size, generator=generator)
    return config, weights_for(config, generator), x, routing


@law(
    configs(weight_on="output", shared=None, latent=None, scale_on="weights").flatmap(
        lambda config: st.tuples(st.just(config), routings(config), SEEDS)
    )
)
def test_the_layer_is_linear_in_the_routing_weights(case: RoutedCase) -> None:
    config, weights, x, routing = routed_parts(case)

    def y(w: Tensor) -> Tensor:
        return moe_fn.moe_forward_routed(config, weights, x, dataclasses.replace(routing, weights=w))

    other = routing.weights.flip(-1) + 1
    assert_matches(y(routing.weights - 2 * other), y(routing.weights) - 2 * y(other), tolerance=1e-5, scale=1.0)


@law(configs().flatmap(lambda config: st.tuples(st.just(config), routings(config), SEEDS)))
def test_any_routing_equals_the_reference(case: RoutedCase) -> None:
    config, weights, x, routing = routed_parts(case)
    expected = reference.moe_forward_routed(config, weights, x, routing)
    assert_matches(moe_fn.moe_forward_routed(config, weights, x, routing), expected, scale=1.0)


@law(st.integers(1, 4), st.integers(0, 6), SEEDS)
def test_choosing_all_experts_gives_the_dense_mixture(num_experts: int, tokens: int, seed: int) -> None:
    config = MoEConfig(num_experts=num_experts, top_k=num_experts, hidden_size=5, intermediate_size=3)
    generator = torch.Generator().manual_seed(seed)
    weights = weights_for(config, generator, bias=False, scales=False)
    x, logits = torch.randn(tokens, 5, generator=generator), torch.randn(tokens, num_experts, generator=generator)
    gate, up = torch.einsum("th,eih->tei", x, weights.gate_up).chunk(2, -1)
    outs = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, weights.down)
    dense = torch.einsum("te,teh->th", logits.softmax(-1), outs)
    assert_matches(moe_fn.moe_forward(config, weights, x, logits), dense, tolerance=1e-5, scale=0.1)


@law(problems(), SEEDS)
def test_garbage_in_padding_never_reaches_the_output(problem: MoEProblem, seed: int) -> None:
    mask = real_tokens(problem).view(problem.x.shape[:-1])
    mask = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.6)

    def filled(t: Tensor | None, value: float) -> Tensor | None:
        return None if t is None else torch.where(mask.unsqueeze(-1), t, value)

    clean = problem.replace(x=filled(problem.x, 0.0), logits=filled(problem.logits, 0.0), token_mask=mask)
    dirty = problem.replace(x=filled(problem.x, torch.nan), logits=filled(problem.logits, torch.inf), token_mask=mask)
    y = forward(dirty)
    assert_matches(y, forward(clean), tolerance=0.0)
    assert (y[~mask] == 0).all()
    direction = direction_of(problem)
    for found, expected in zip(
        gradients(dirty, moe_fn.moe_forward, direction), gradients(clean, moe_fn.moe_forward, direction), strict=True
    ):
        assert torch.isfinite(found).all()
        assert_matches(found, expected, tolerance=1e-6, scale=0.1)


@law(problems(configs(chunk_tokens=st.integers(1, 5), opaque=st.booleans())))
def test_chunked_equals_unchunked(problem: MoEProblem) -> None:
    assert_same_function(problem, config_with(problem, chunk_tokens=None))


@law(problems(configs(opaque=True)))
def test_opaque_equals_transparent(problem: MoEProblem) -> None:
    assert_same_function(problem, config_with(problem, opaque=False))


def in_autocast(problem: MoEProblem, function: Any) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return problem.call(function)


@law(problems(configs(gate_input="original", gate_dtype="float32"), logits="gate"), SEEDS)
def test_autocast_does_not_round_a_float32_gate(problem: MoEProblem, seed: int) -> None:
    # that bfloat16 does not represent
    digits = torch.rand(problem.x.shape, generator=torch.Generator().manual_seed(seed)) / 256
    problem = problem.replace(x=problem.x * (1 + digits))
    logits, routing = problem.call(moe_fn.moe_route)
    assert_matches(in_autocast(problem, moe_fn.moe_route), (logits, routing), tolerance=0.0)
    assert torch.equal(
        in_autocast(problem, moe_fn.moe_forward_with_stats)[1].expert_ids.flatten(), routing.expert_ids.flatten()
    )


def cast_by_hand(weights: MoEWeights, dtype: torch.dtype) -> MoEWeights:
    """Casts the weights, without those of the router, and without codes, scales and zero points."""
    cast: MoEWeights = tree_map(
        lambda t: t.to(dtype) if t.is_floating_point() and t.dtype != torch.float8_e4m3fn else t, weights
    )
    kept = {"router": weights.router, "quant": weights.quant}
    return dataclasses.replace(cast, **kept)


@law(problems(configs(gate_dtype="float32")))
def test_autocast_equals_weights_in_its_dtype(problem: MoEProblem) -> None:
    logits = problem.logits
    if logits is None and problem.config.router.gate_input == "original":
        logits = problem.call(moe_fn.moe_route)[0]
    by_hand = problem.replace(
        weights=cast_by_hand(problem.weights, torch.bfloat16), x=problem.x.to(torch.bfloat16), logits=logits
    )
    y = in_autocast(problem, moe_fn.moe_forward)
    assert y.dtype == problem.x.dtype
    assert_matches(y.to(torch.bfloat16), forward(by_hand), tolerance=1e-6)
    # tensors of this dtype are not changed
    assert torch.equal(in_autocast(by_hand, moe_fn.moe_forward), forward(by_hand))


@law(problems(), st.sampled_from([(1, 1), (2, 1), (1, 2, 1)]))
def test_flattening_leading_dimensions_changes_nothing(problem: MoEProblem, ones: tuple[int, ...]) -> None:
    plain = problem.of_tokens(torch.arange(problem.x[..., 0].numel()).repeat(max(ones)))

    def shaped(t: Tensor | None, extra: int) -> Tensor | None:
        return None if t is None else t.view(*ones, -1, *t.shape[t.ndim - extra :])

    deep = plain.replace(
        x=shaped(plain.x, 1),
        logits=shaped(plain.logits, 1),
        token_ids=shaped(plain.token_ids, 0),
        token_mask=shaped(plain.token_mask, 0),
    )
    assert_matches(forward(deep).flatten(0, -2), forward(plain), tolerance=0.0)


@law(problems())
def test_inputs_are_never_written_to(problem: MoEProblem) -> None:
    problem = with_gradients(problem)
    before = [t.detach().clone() for t in leaves(problem.weights, problem.x, problem.logits)]
    forward(problem).sum().backward() if forward(problem).requires_grad else None
    for t, old in zip(leaves(problem.weights, problem.x, problem.logits), before, strict=True):
        assert torch.equal(t.detach().nan_to_num(nan=1e9), old.nan_to_num(nan=1e9))
        assert t._version == 0


@law(problems())
def test_the_same_inputs_give_the_same_bits(problem: MoEProblem) -> None:
    assert_matches(forward(problem), forward(problem), tolerance=0.0)
    direction = direction_of(problem)
    first, second = (gradients(problem, moe_fn.moe_forward, direction) for _ in range(2))
    assert_matches(first, second, tolerance=0.0)


@law(problems())
def test_shared_and_routed_add_up_to_the_layer(problem: MoEProblem) -> None:
    shared, routed = problem.call(moe_fn.moe_forward_shared)
    assert_matches(shared + routed, forward(problem), scale=0.1)
    if problem.config.shared is None:
        assert (shared == 0).all()


@law(problems())
def test_stats_do_not_change_the_output(problem: MoEProblem) -> None:
    y, stats = problem.call(moe_fn.moe_forward_with_stats)
    assert_matches(y, forward(problem), scale=0.1)
    assert torch.isfinite(stats.router_z_loss)


@law(problems())
def test_expert_load_counts_the_slots(problem: MoEProblem) -> None:
    _, stats = problem.call(moe_fn.moe_forward_with_stats)
    assert int(stats.expert_load.sum()) == int(real_tokens(problem).sum()) * problem.config.top_k
    assert int(stats.dropped_slots) == 0
    for expert, load in enumerate(stats.expert_load.tolist()):
        assert load == int((stats.expert_ids == expert).sum())


@law(problems(configs(selection="top_k")))
def test_losses_equal_the_reference(problem: MoEProblem) -> None:
    _, stats = problem.call(moe_fn.moe_forward_with_stats)
    logits, mask = logits_of(problem)[:, : problem.config.num_choices], flat(problem.token_mask)
    scores, ids = moe_fn.stages._scores.scores_of_logits(problem.config, logits_of(problem)), stats.expert_ids
    length = problem.x.shape[-2]
    sequences = (scores.view(-1, length, scores.shape[-1]), ids.view(-1, length, ids.shape[-1])) if length else None
    assert_matches(stats.router_z_loss, reference.router_z_loss(logits, token_mask=mask), tolerance=1e-5, scale=0.1)
    expected = reference.load_balancing_loss(scores, ids, problem.config.num_choices, token_mask=mask)
    assert_matches(stats.load_balancing_loss, expected, tolerance=1e-5, scale=0.1)
    if sequences is not None:
        by_sequence = None if mask is None else mask.view(-1, length)
        expected = reference.sequence_balancing_loss(*sequences, problem.config.num_choices, token_mask=by_sequence)
        assert_matches(stats.sequence_balancing_loss, expected, tolerance=1e-5, scale=0.1)


@law(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_the_bias_of_overloaded_experts_falls_and_of_idle_ones_rises(load: list[int]) -> None:
    bias = torch.zeros(len(load))
    updated = moe_fn.balance.update_correction_bias(bias, torch.tensor(load), 0.25)
    mean = sum(load) / len(load)
    assert updated.tolist() == [0.25 * ((mean > n) - (mean < n)) for n in load]
    assert (bias == 0).all()
