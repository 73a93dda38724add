"""The router kernel in Triton's interpreter, compared with moe_fn.route, for every config that it supports."""

import dataclasses
import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 before the first import of triton", allow_module_level=True)

from router_problems import LOGITS, NORMS, SEEDS, config_of, problem_of, router_configs

from moe_fn.config import GroupConfig, MoEConfig, RouterConfig, SharedExpertsConfig
from moe_fn.fused.route import route
from moe_fn.kernels.triton.support import LANES, MOST_GROUPS, router_problem
from moe_fn.kernels.triton.top_k import route_top_k
from moe_fn.records import MoEWeights, RouterWeights
from moe_fn.testing import assert_matches


def both(config: MoEConfig, logits: Tensor, bias: Tensor | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns (ids, weights) of the kernel and of route."""
    router = None if bias is None else RouterWeights(correction_bias=bias)
    size = config.num_experts
    expected = route(
        config, MoEWeights(gate_up=torch.zeros(size, 2, 1), down=torch.zeros(size, 1, 1), router=router), logits
    )
    with warnings.catch_warnings():
        # numpy's warnings for NaN and infinities
        warnings.simplefilter("ignore", RuntimeWarning)
        actual = route_top_k(config, logits, bias)
    return actual, (expected.expert_ids, expected.weights)


def values_for_choice(config: MoEConfig, logits: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    """Returns the values that choose the ids, without groups: route's weights of each single choice, plus the bias."""
    plain = dataclasses.replace(
        config.router, groups=None, correction_bias="none", renormalize=False, scale_on="weights"
    )
    plain = dataclasses.replace(
        plain, routed_scaling_factor=1.0, renormalize_epsilon=0.0, renormalize_minimum=0.0, renormalize_order=1.0
    )
    if config.router.correction_bias == "logits" or (config.router.scoring_order, config.router.correction_bias) == (
        "after_top_k",
        "none",
    ):
        plain = dataclasses.replace(plain, scoring="identity")
    every = config_of(config.num_choices, config.num_choices, dataclasses.replace(plain, scoring_order="before_top_k"))
    (_, _), (order, sorted_values) = both(every, logits, None)
    values = torch.zeros_like(sorted_values).scatter(1, order, sorted_values)
    return (values if bias is None else values + bias).gather(1, ids)


def assert_same_routing(config: MoEConfig, logits: Tensor, bias: Tensor | None) -> None:
    """Checks that ids are equal, or differ where scores differ by less than 1e-6: the last bit of exp differs between
    numpy, torch and a GPU.
    """
    assert router_problem(config.json, logits.dtype) is None
    (ids, weights), (expected_ids, expected_weights) = both(config, logits, bias)
    assert (
        ids.dtype == torch.int64 and weights.dtype == torch.float32 and ids.shape == weights.shape == expected_ids.shape
    )
    different = (ids != expected_ids).any(1)
    if different.any():
        assert config.router.groups is None, f"{ids[different]} != {expected_ids[different]}"
        chosen, wanted = (values_for_choice(config, logits, bias, i)[different] for i in (ids, expected_ids))
        torch.testing.assert_close(chosen, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weights[~different], expected_weights[~different], rtol=2e-6, atol=1e-30)


@given(router_configs(), st.integers(0, 9), SEEDS)
@settings(max_examples=30)
def test_routing_equals_route(config: MoEConfig, num_tokens: int, seed: int) -> None:
    logits, bias = problem_of(config, num_tokens, seed)
    assert_same_routing(config, logits, bias)


@given(router_configs(24), st.integers(1, 9), SEEDS)
@settings(max_examples=30)
def test_what_is_no_number_counts_as_in_route(config: MoEConfig, num_tokens: int, seed: int) -> None:
    # 1e30 passes unchanged, and a norm of such values overflows for some orders of the sum
    if config.router.scoring == "identity":
        config = dataclasses.replace(config, router=dataclasses.replace(config.router, scoring="softmax"))
    logits, bias = problem_of(config, num_tokens, seed, wild=True)
    assert_same_routing(config, logits, bias)


@given(router_configs(40), st.sampled_from([torch.float16, torch.float32]), st.booleans(), SEEDS)
@settings(max_examples=20)
def test_any_logits_of_any_dtype_and_stride(config: MoEConfig, dtype: torch.dtype, narrowed: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, config.num_choices + 3, generator=generator).to(dtype)
    logits = logits[:, : config.num_choices] if narrowed else logits[:, 3:].mT.contiguous().mT
    config = dataclasses.replace(config, router=dataclasses.replace(config.router, groups=None))
    _, bias = problem_of(config, 0, seed)
    assert_same_routing(config, logits, bias)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus", "identity"])
def test_ties_go_to_the_lowest_id_and_minus_zero_is_zero(scoring: str) -> None:
    config = config_of(7, 3, RouterConfig(scoring=scoring, renormalize=False))
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0, 0.0, 0.0], [-1.0, 2.0, 1.0, 2.0, 1.0, 1.0, 2.0], [-5.0] * 7])
    (ids, weights), expected = both(config, logits, None)
    assert ids.tolist() == [[0, 1, 2], [1, 3, 6], [0, 1, 2]]
    assert_matches((ids, weights), expected)


@pytest.mark.parametrize(("choices", "top_k"), [(1, 1), (2, 2), (33, 33), (300, 20)])
def test_sizes_at_the_edges(choices: int, top_k: int) -> None:
    config = config_of(choices, top_k, RouterConfig())
    assert_same_routing(config, *problem_of(config, 40 if choices < 33 else 5, choices))


def test_what_is_not_covered_is_said() -> None:
    def covered(dtype: torch.dtype = torch.float32, choices: int = 8, top_k: int = 2, **router: object) -> bool:
        config = config_of(choices, top_k, RouterConfig(**router))  # type: ignore[arg-type]
        return router_problem(config.json, dtype) is None

    assert covered() and covered(torch.bfloat16) and covered(torch.float16) and covered(choices=LANES)
    assert covered(score_dtype="input")
    assert (
        not covered(torch.float64)
        and not covered(torch.float16, score_dtype="input")
        and not covered(choices=LANES + 1)
    )
    assert not covered(selection="hash") and not covered(selection="sparsemixer", renormalize=False)
    assert not covered(renormalize_order=3.0)
    assert not covered(groups=GroupConfig(count=2, top_k=2, limit="each"))
    assert not covered(choices=9 * 100, groups=GroupConfig(count=9, top_k=2))  # 16 * 128 lanes
    assert not covered(choices=2 * MOST_GROUPS, groups=GroupConfig(count=2 * MOST_GROUPS, top_k=2))
    shared = SharedExpertsConfig(intermediate_size=1, gate="router")
    by_router = MoEConfig(
        num_experts=2,
        top_k=1,
        hidden_size=1,
        intermediate_size=1,
        router=RouterConfig(scoring="sigmoid"),
        shared=shared,
    )
    assert router_problem(by_router.json, torch.float32) is not None


def test_every_option_has_its_case() -> None:
    """All combinations of options at small sizes, so that none depends on a draw."""
    scorings, orders = ("softmax", "sigmoid", "sqrtsoftplus", "identity"), ("before_top_k", "after_top_k")
    for place, (scoring, order, bias) in enumerate(itertools.product(scorings, orders, ("none", "scores", "logits"))):
        router = RouterConfig(
            scoring=scoring,
            scoring_order=order,
            correction_bias=bias,
            **NORMS[place % len(NORMS)],
            **LOGITS[place % len(LOGITS)],
        )
        config = config_of(11, 3, router)
        assert_same_routing(config, *problem_of(config, 4, place))
