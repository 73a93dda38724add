"""Laws of prepared weights, and of the kernel that reads them."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from support import law, leaves
from torch import Tensor
from torch.utils._pytree import tree_map

import moe_fn
from moe_fn import MoEConfig, MoEWeights, QuantConfig, Routing
from moe_fn.fused import routed_experts
from moe_fn.kernels.native import library as native
from moe_fn.kernels.native.support import DTYPES
from moe_fn.layer import call
from moe_fn.testing import assert_matches, configs, weights_for
from moe_fn.weights.prepare import convert_experts

NATIVE = native.active().problem is None
pytestmark = pytest.mark.skipif(not NATIVE, reason="no native kernels here")

PLAIN = configs(
    expert_norm=None, shared=None, latent=None, zero_experts=None, opaque=False, chunk_tokens=None, backend="auto"
)
CASES = st.tuples(PLAIN, st.integers(0, 40), st.booleans(), st.sampled_from(DTYPES), st.integers(0, 2**20))
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}
Case = tuple[MoEConfig, int, bool, torch.dtype, int]


def problem_of(case: Case) -> tuple[MoEConfig, MoEWeights, Tensor, Routing]:
    """Returns weights, tokens and a random routing, whose ids may be -1 and greater than the last expert."""
    config, tokens, one_expert, dtype, seed = case
    generator = torch.Generator().manual_seed(seed)
    weights = tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, weights_for(config, generator, bias=True))
    x = torch.randn(tokens, config.expert_hidden_size, generator=generator).to(dtype)
    ids = torch.randint(-1, config.num_experts + 1, (tokens, config.top_k), generator=generator)
    ids = torch.full_like(ids, config.num_experts - 1) if one_expert else ids
    return config, weights, x, Routing(expert_ids=ids, weights=torch.rand(tokens, config.top_k, generator=generator))


@law(CASES)
def test_prepared_weights_give_the_same_numbers(case: Case) -> None:
    config, weights, x, routing = problem_of(case)
    prepared = moe_fn.prepare_weights(config, weights)
    assert prepared.gate_up.ndim == 4
    actual, expected = (routed_experts.routed_experts(config, w, x, routing) for w in (prepared, weights))
    assert_matches(actual, expected, scale=0.5)
    # A back-end without kernels for them restores the plain weights.
    assert_matches(
        routed_experts.dispatch_experts_combine(config, prepared, x, routing),
        routed_experts.dispatch_experts_combine(config, weights, x, routing),
        tolerance=0.0,
    )


@law(CASES)
def test_restoring_undoes_preparing(case: Case) -> None:
    config, weights, _, _ = problem_of(case)
    restored = moe_fn.restore_weights(config, moe_fn.prepare_weights(config, weights))
    for name in ("gate_up", "down"):
        assert torch.equal(getattr(restored, name), getattr(weights, name))


@law(CASES)
def test_converting_prepared_weights_is_preparing_converted_ones(case: Case) -> None:
    config, weights, _, _ = problem_of(case)
    for dtype in DTYPES:
        converted = convert_experts(config, moe_fn.prepare_weights(config, weights), dtype)
        by_hand = moe_fn.prepare_weights(
            config,
            tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, weights),  # noqa: B023
        )
        assert torch.equal(converted.gate_up, by_hand.gate_up) and torch.equal(converted.down, by_hand.down)


def test_autocast_reads_prepared_weights_and_codes_as_they_are() -> None:
    sizes = {"num_experts": 4, "top_k": 2, "hidden_size": 32, "intermediate_size": 48}
    x, codes = (
        torch.randn(5, 32, generator=torch.Generator().manual_seed(0)),
        QuantConfig(scheme="int8", granularity="channel"),
    )
    for config, dtype in ((MoEConfig(**sizes), torch.bfloat16), (MoEConfig(**sizes, quant=codes), torch.uint8)):
        plain = weights_for(config)
        if config.quant is None:
            plain = dataclasses.replace(plain, gate_up=plain.gate_up.to(dtype), down=plain.down.to(dtype))
        prepared = moe_fn.prepare_weights(config, plain)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            entered = call.check_and_flatten("test", config, prepared, x, None, None, None)
            ys = [moe_fn.moe_forward(config, weights, x) for weights in (prepared, plain)]
        kept = [getattr(weights, name) for weights in (entered.weights, prepared) for name in ("gate_up", "down")]
        assert kept[0] is kept[2] and kept[1] is kept[3] and entered.weights.quant == prepared.quant  # the same tensors
        assert torch.equal(*ys)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_prepared_weights_in_another_dtype_is_that_of_plain_ones(dtype: torch.dtype) -> None:
    config = MoEConfig(num_experts=4, top_k=2, hidden_size=33, intermediate_size=47)
    weights, x = weights_for(config), torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    found = []
    for given in (weights, moe_fn.prepare_weights(config, weights)):
        leaves_of_given = [t.requires_grad_() for t in (given.gate_up, given.down)]
        with torch.autocast("cpu", dtype=dtype):
            y = moe_fn.moe_forward(config, given, x)
        gate_up, down = torch.autograd.grad(y.square().sum(), leaves_of_given)
        found.append((y, moe_fn.restore_weights(config, MoEWeights(gate_up=gate_up, down=down))))
    assert_matches(found[1], found[0], tolerance=1e-2, scale=0.5)


@law(CASES)
def test_preparing_twice_is_preparing_once(case: Case) -> None:
    config, weights, _, _ = problem_of(case)
    once = moe_fn.prepare_weights(config, weights)
    assert moe_fn.prepare_weights(config, once) is once


@law(CASES)
def test_the_fused_kernel_equals_the_stages(case: Case) -> None:
    config, weights, x, routing = problem_of(case)
    if config.router.weight_on == "input":
        routing = dataclasses.replace(routing, weights=torch.ones_like(routing.weights))
    staged = dataclasses.replace(config, backend="torch")

    def run(function: Any, config: MoEConfig) -> list[Tensor]:
        inputs = tree_map(lambda t: t.clone().requires_grad_() if t.is_floating_point() else t, (weights, x, routing))
        y = function(config, *inputs)
        found = torch.autograd.grad(y.square().sum(), leaves(inputs), allow_unused=True)
        return [y, *(torch.zeros(0) if g is None else g for g in found)]

    for actual, expected in zip(
        run(routed_experts.by_native_op, config), run(routed_experts.dispatch_experts_combine, staged), strict=True
    ):
        # The gradient of the routing weights is as accurate as x; in bfloat16 and float16 both sides are rounded.
        assert_matches(actual.to(x.dtype), expected.to(x.dtype), tolerance=TOLERANCE[x.dtype], scale=1.0)


def test_the_input_is_left_alone_and_what_cannot_be_laid_comes_back() -> None:
    config = MoEConfig(num_experts=3, top_k=1, hidden_size=5, intermediate_size=7)
    weights = weights_for(config, torch.Generator().manual_seed(0))
    before = weights.gate_up.clone()
    moe_fn.prepare_weights(config, weights)
    assert torch.equal(weights.gate_up, before)
    wide = dataclasses.replace(weights, gate_up=weights.gate_up.double(), down=weights.down.double())
    assert moe_fn.prepare_weights(config, wide) is wide
    assert moe_fn.prepare_weights(dataclasses.replace(config, backend="torch"), weights) is weights


def test_wrong_shapes_are_named() -> None:
    config = MoEConfig(num_experts=3, top_k=1, hidden_size=5, intermediate_size=7)
    weights = weights_for(config, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"prepare_weights: gate_up and down are .*expected \(3, 14, 5\)"):
        moe_fn.prepare_weights(config, dataclasses.replace(weights, gate_up=weights.gate_up[:, :-1]))
    prepared = moe_fn.prepare_weights(config, weights)
    x, logits = torch.ones(2, 5), torch.ones(2, 3)
    for wrong, words in (
        (dataclasses.replace(prepared, down=weights.down), "one of weights.gate_up and weights.down is prepared"),
        (dataclasses.replace(prepared, gate_up=prepared.gate_up[:, :, :-1]), "weights.gate_up is .*steps"),
        (tree_map(lambda t: t.bfloat16(), prepared), "expected the dtype of x|steps"),
    ):
        with pytest.raises(ValueError, match=words):
            moe_fn.moe_forward(config, wrong, x, logits)


def test_a_back_end_that_cannot_run_says_so() -> None:
    config = MoEConfig(num_experts=3, top_k=1, hidden_size=5, intermediate_size=7, backend="native")
    weights = tree_map(lambda t: t.double(), weights_for(config, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match=r"MoEConfig.backend='native': .*float64"):
        moe_fn.moe_forward(config, weights, torch.ones(2, 5).double(), torch.ones(2, 3))
