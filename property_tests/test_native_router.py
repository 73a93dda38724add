"""The C++ router at each instruction-set level of this CPU: the stages' bits with batch_invariant."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_problems import LOGITS, NORMS, SEEDS, config_of, problem_of, router_configs
from test_native import RUNNABLE
from torch import Tensor

import moe_fn
from moe_fn import MoEConfig, MoEWeights, RouterConfig
from moe_fn.config import GroupConfig
from moe_fn.fused.route import native_op
from moe_fn.kernels.native import library as native
from moe_fn.kernels.native.support import router_problem
from moe_fn.records import RouterWeights
from moe_fn.stages.route import choose_experts
from moe_fn.testing import assert_matches

pytestmark = pytest.mark.skipif(not RUNNABLE, reason="no native kernels here")


def assert_bits_of_the_stages(level: str, config: MoEConfig, logits: Tensor, bias: Tensor | None) -> None:
    assert router_problem(config.json, logits.dtype) is None
    ops: Any = native.library(level).ops
    weights, ids = ops.route_top_k(logits, bias, config.json)
    invariant = dataclasses.replace(config, batch_invariant=True)
    expected = choose_experts(invariant, RouterWeights(correction_bias=bias), logits, None)
    assert torch.equal(ids, expected.expert_ids), f"{ids} != {expected.expert_ids}"
    # MKL's square roots, which torch's are on some CPUs, are not rounded as IEEE 754 has it.
    roots = config.router.scoring == "sqrtsoftplus" or config.router.renormalize_order == 2.0
    torch.testing.assert_close(weights, expected.weights, rtol=5e-7 if roots else 0.0, atol=0.0)


@pytest.mark.parametrize("level", RUNNABLE)
@given(router_configs(), st.integers(0, 9), SEEDS, st.booleans())
@settings(max_examples=40)
def test_bits_are_those_of_the_stages(level: str, config: MoEConfig, num_tokens: int, seed: int, wild: bool) -> None:
    logits, bias = problem_of(config, num_tokens, seed, wild)
    assert_bits_of_the_stages(level, config, logits, bias)


@pytest.mark.parametrize("level", RUNNABLE)
@given(router_configs(40), st.sampled_from([torch.bfloat16, torch.float32]), st.booleans(), SEEDS)
@settings(max_examples=20)
def test_any_logits_of_any_dtype_and_stride(
    level: str, config: MoEConfig, dtype: torch.dtype, narrowed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, config.num_choices + 3, generator=generator).to(dtype)
    logits = logits[:, : config.num_choices] if narrowed else logits[:, 3:].mT.contiguous().mT
    assert_bits_of_the_stages(level, config, logits, problem_of(config, 0, seed)[1])


@pytest.mark.parametrize("level", RUNNABLE)
def test_every_option_at_sizes_of_models(level: str) -> None:
    """All combinations of options, so that none depends on a draw."""
    scorings, orders = ("softmax", "sigmoid", "sqrtsoftplus", "identity"), ("before_top_k", "after_top_k")
    for place, (scoring, order, bias) in enumerate(itertools.product(scorings, orders, ("none", "scores", "logits"))):
        options = NORMS[place % len(NORMS)] | LOGITS[place % len(LOGITS)]
        router = RouterConfig(scoring=scoring, scoring_order=order, correction_bias=bias, **options)  # type: ignore[arg-type]
        config = config_of(128, 8, router)
        generator = torch.Generator().manual_seed(place)
        assert_bits_of_the_stages(level, config, torch.randn(4, 128, generator=generator), problem_of(config, 0, 0)[1])


@pytest.mark.parametrize("level", RUNNABLE)
@pytest.mark.parametrize(("choices", "top_k"), [(1, 1), (2, 2), (33, 33), (300, 20), (520, 8)])
def test_sizes_at_the_edges_and_rows_of_several_threads(level: str, choices: int, top_k: int) -> None:
    groups = GroupConfig(count=40, top_k=20, score="top2_sum") if choices == 520 else None
    config = config_of(choices, top_k, RouterConfig(scoring="sigmoid", groups=groups))
    assert_bits_of_the_stages(level, config, *problem_of(config, 120, choices))


@pytest.mark.parametrize("level", RUNNABLE)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus", "identity"])
def test_ties_go_to_the_lowest_id_and_minus_zero_is_zero(level: str, scoring: str) -> None:
    config = config_of(7, 3, RouterConfig(scoring=scoring, renormalize=False))  # type: ignore[arg-type]
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0, 0.0, 0.0], [-1.0, 2.0, 1.0, 2.0, 1.0, 1.0, 2.0], [-5.0] * 7])
    ops: Any = native.library(level).ops
    assert ops.route_top_k(logits, None, config.json)[1].tolist() == [[0, 1, 2], [1, 3, 6], [0, 1, 2]]


def test_a_layer_routes_by_the_op_and_a_token_has_its_bits_in_any_batch() -> None:
    config = config_of(64, 8, RouterConfig())
    weights = MoEWeights(gate_up=torch.zeros(64, 2, 1), down=torch.zeros(64, 1, 1))
    logits = torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
    whole, one = (moe_fn.route(config, weights, rows) for rows in (logits, logits[431:432]))
    assert torch.equal(whole.weights[431:432], one.weights) and torch.equal(whole.expert_ids[431:432], one.expert_ids)
    assert torch.equal(whole.weights, native_op(logits, None, config.json)[0])
    in_torch = moe_fn.route(dataclasses.replace(config, backend="torch"), weights, logits)
    assert_matches(whole.weights, in_torch.weights)


@pytest.mark.parametrize("level", RUNNABLE)
def test_wrong_arguments_raise_in_words(level: str) -> None:
    ops: Any = native.library(level).ops
    config = config_of(8, 2, RouterConfig(groups=GroupConfig(count=4, top_k=2)))
    calls = {
        r"logits are \[8\]; expected \[tokens, experts\]": (torch.zeros(8), None, config.json),
        r"expected at least 2 experts in 2 of 4 equal groups": (torch.zeros(1, 7), None, config.json),
        r"correction_bias is \[7\]; expected 8": (torch.zeros(1, 8), torch.zeros(7), config.json),
        r"expected one with router": (torch.zeros(1, 8), None, "{}"),
        r"expected one with top_k": (torch.zeros(1, 8), None, '{"router": {"groups": null}, "top_k'),
        r"scoring is sum; expected one of softmax": (torch.zeros(1, 8), None, config.json.replace("softmax", "sum")),
        r"expected at least 3 experts": (torch.zeros(1, 2), None, config_of(3, 3, RouterConfig()).json),
    }
    for message, arguments in calls.items():
        with pytest.raises(ValueError, match=message):
            ops.route_top_k(*arguments)
