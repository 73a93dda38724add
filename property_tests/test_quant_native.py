"""Quantized weights in the native kernels, at each instruction-set level of this CPU, compared with float64 of the
dequantized weights.
"""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import on_every
from test_native import ACTIVATIONS, DTYPES, RUNNABLE, call
from torch import Tensor

import moe_fn
from moe_fn import MoEConfig, MoEWeights, Routing
from moe_fn.config import ActivationQuantConfig, QuantConfig, as_activation
from moe_fn.fused import routed_experts
from moe_fn.kernels.native import support
from moe_fn.testing import assert_matches, quants, weights_for
from moe_fn.weights.quantize import dequantize_weights

pytestmark = pytest.mark.skipif(not RUNNABLE, reason="no native kernels here")

INT8 = ActivationQuantConfig(scheme="int8", granularity="token")
QUANTS = [
    QuantConfig(scheme="int4", granularity="group", group_size=32),
    QuantConfig(scheme="int4", granularity="group", group_size=72, zero_points=True),
    QuantConfig(scheme="int4", granularity="group", group_size=8, activations=INT8),
    QuantConfig(scheme="int4", granularity="channel", zero_points=True, activations=INT8),
    QuantConfig(scheme="int4", granularity="block", block_shape=(7, 64), zero_points=True),
    QuantConfig(scheme="int4", granularity="tensor"),
    QuantConfig(scheme="int8", granularity="channel"),
    QuantConfig(scheme="int8", granularity="group", group_size=4, zero_points=True),
    QuantConfig(scheme="int8", granularity="tensor", activations=INT8),
    QuantConfig(scheme="int8", granularity="group", group_size=64, zero_points=True, activations=INT8),
    QuantConfig(scheme="fp8_e4m3", granularity="block", block_shape=(16, 32)),
    QuantConfig(scheme="fp8_e4m3", granularity="channel"),
    QuantConfig(scheme="mxfp4", granularity="group", group_size=32),
    QuantConfig(scheme="mxfp8", granularity="group", group_size=32),
    QuantConfig(scheme="nvfp4", granularity="group", group_size=16),
]
NAME = "{0.scheme} {0.granularity}".format
# Experts, choices, inputs and hidden: odd sizes, many spans of inputs, and spans that are not whole chunks.
SIZES = [(5, 2, 34, 18), (3, 3, 64, 48), (4, 2, 130, 90), (2, 1, 2, 2), (1, 1, 800, 20)]
Case = tuple[MoEConfig, MoEWeights, Tensor, Routing]


def problem(
    quant: QuantConfig, size: tuple[int, ...], tokens: int, activation: Any, interleaved: bool, dtype: torch.dtype
) -> Case:
    generator = torch.Generator().manual_seed(tokens)
    experts, top_k, hidden, inner = size
    config = MoEConfig(
        num_experts=experts,
        top_k=top_k,
        hidden_size=hidden,
        intermediate_size=inner,
        activation=activation,
        gate_up_layout="interleaved" if interleaved and as_activation(activation).gated else "packed",
        quant=quant,
    )
    weights = weights_for(config, generator, bias=True)
    if quant.row.scale == "float" and weights.quant is not None:
        of = torch.float16 if interleaved else torch.bfloat16 if quant.granularity == "group" else torch.float32
        scales = {name: getattr(weights.quant, name).to(of) for name in ("gate_up_scale", "down_scale")}
        weights = dataclasses.replace(weights, quant=dataclasses.replace(weights.quant, **scales))
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    ids = torch.randint(-1, experts, (tokens, top_k), generator=generator)
    return config, weights, x, Routing(expert_ids=ids, weights=torch.rand(tokens, top_k, generator=generator))


@pytest.mark.parametrize("level", RUNNABLE)
@settings(max_examples=30)
@on_every(QUANTS, lambda quant: (quant, (3, 3, 64, 48), 32, "silu", False, torch.float32))  # 22, 22 and 28 rows
@on_every(ACTIVATIONS, lambda activation: (QUANTS[6], (5, 2, 34, 18), 13, activation, True, torch.bfloat16))
@given(
    st.sampled_from(QUANTS),
    st.sampled_from(SIZES),
    st.sampled_from([0, 1, 3, 13, 17, 60]),
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
    DTYPES,
)
def test_every_level_equals_the_reference(
    level: str,
    quant: QuantConfig,
    size: tuple[int, ...],
    tokens: int,
    activation: Any,
    interleaved: bool,
    dtype: torch.dtype,
) -> None:
    config, weights, x, routing = problem(quant, size, tokens, activation, interleaved, dtype)
    expected = moe_fn.reference.moe_forward_routed(config, weights, x, routing)
    prepared = moe_fn.prepare_weights(config, weights)
    assert prepared.gate_up.ndim == 4
    outs = [call(level, config, w, x, routing) for w in (weights, prepared)]
    assert torch.equal(*outs)
    # A hidden value on the other side of a tie has another code.
    loose = quant.activations is not None
    assert_matches(outs[0], expected, scale=1.0, tolerance=2e-2 if loose else None)


@pytest.mark.parametrize("level", RUNNABLE)
@settings(max_examples=25)
@given(st.sampled_from(QUANTS), st.integers(1, 60), st.integers(0, 2**20), DTYPES)
# int8 rows on tiles: spans that are shorter than a tile, and spans of whole tiles with corrections; 50 rows are 4 tiles
@example(QUANTS[2], 50, 40, torch.bfloat16)
@example(QUANTS[9], 50, 40, torch.bfloat16)
def test_the_bits_of_a_token_do_not_depend_on_the_others(
    level: str, quant: QuantConfig, tokens: int, seed: int, dtype: torch.dtype
) -> None:
    config, weights, x, routing = problem(quant, (1, 1, 272, 40), tokens, "silu", False, dtype)
    config = dataclasses.replace(config, batch_invariant=True)
    routing = dataclasses.replace(routing, expert_ids=torch.zeros_like(routing.expert_ids))
    prepared = moe_fn.prepare_weights(config, weights)
    one = seed % tokens
    of_one = Routing(expert_ids=routing.expert_ids[one : one + 1], weights=routing.weights[one : one + 1])
    assert torch.equal(
        call(level, config, prepared, x, routing)[one : one + 1],
        call(level, config, prepared, x[one : one + 1], of_one),
    )


@pytest.mark.parametrize("level", RUNNABLE)
@pytest.mark.parametrize("quant", QUANTS, ids=NAME)
def test_missing_values_stay_in_their_rows(level: str, quant: QuantConfig) -> None:
    config, weights, x, routing = problem(quant, (2, 1, 66, 34), 60, "silu", False, torch.float32)
    routing = dataclasses.replace(routing, expert_ids=routing.expert_ids.clamp(min=0))
    clean = call(level, config, weights, x, routing)
    spoiled = x.clone()
    spoiled[3], spoiled[7, 5] = math.nan, math.inf
    out = call(level, config, weights, spoiled, routing)
    rest = [t for t in range(60) if t not in (3, 7)]
    assert torch.equal(out[rest], clean[rest])
    assert out[3].isnan().all()


@settings(max_examples=40)
@given(quants(), st.integers(0, 20), st.booleans(), DTYPES)
def test_preparing_codes_is_undone_and_changes_nothing(
    quant: QuantConfig, tokens: int, interleaved: bool, dtype: torch.dtype
) -> None:
    config, weights, x, routing = problem(quant, (3, 2, 36, 20), tokens, "silu", interleaved, dtype)
    prepared = moe_fn.prepare_weights(config, weights)
    taken = support.quant_problem(quant.json, 36, 20, "cpu") is None
    assert taken == (prepared is not weights) == (prepared.gate_up.ndim == 4)
    restored = moe_fn.restore_weights(config, prepared)
    assert restored.quant is not None and weights.quant is not None
    for found, given_ in ((restored, weights), (restored.quant, weights.quant)):
        for field in dataclasses.fields(found):
            one, other = getattr(found, field.name), getattr(given_, field.name)
            if isinstance(other, Tensor):
                assert one.dtype == other.dtype and torch.equal(
                    one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
                )
    logits = torch.randn(tokens, 3)
    layer = dataclasses.replace(config, backend="native")
    actual, expected = (moe_fn.moe_forward(layer, w, x, logits) for w in (prepared, weights))
    assert torch.equal(actual, expected)
    assert_matches(
        routed_experts.dispatch_experts_combine(layer, prepared, x, routing),
        routed_experts.dispatch_experts_combine(layer, weights, x, routing),
        tolerance=0.0,
    )


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("quant", [quant for quant in QUANTS if quant.activations is None], ids=NAME)
def test_gradients_are_those_of_the_floats(quant: QuantConfig, prepare: bool) -> None:
    config, weights, x, routing = problem(quant, (3, 2, 34, 18), 11, "silu", False, torch.float32)
    plain, floats = dequantize_weights(config, weights)
    weights = moe_fn.prepare_weights(config, weights) if prepare else weights

    def gradients(config: MoEConfig, weights: MoEWeights) -> list[Tensor]:
        inputs = x.clone().requires_grad_(), routing.weights.clone().requires_grad_()
        y = routed_experts.routed_experts(config, weights, inputs[0], dataclasses.replace(routing, weights=inputs[1]))
        return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]

    for actual, expected in zip(gradients(config, weights), gradients(plain, floats), strict=True):
        assert_matches(actual, expected, scale=1.0, tolerance=1e-5)


def test_what_the_kernels_do_not_take_runs_by_stages_and_says_why() -> None:
    rounded = ActivationQuantConfig(scheme="mxfp8", granularity="group", group_size=32)
    for quant, words in (
        (
            QuantConfig(scheme="int4", granularity="group", group_size=12),
            "a scale of 12 inputs; the native kernels take multiples of 8",
        ),
        (QuantConfig(scheme="mxfp8", granularity="group", group_size=32, activations=rounded), "mxfp8 activations"),
    ):
        assert words in str(support.quant_problem(quant.json, 64, 64, "cpu"))
    config, weights, x, routing = problem(QUANTS[0], (2, 1, 64, 32), 3, "silu", False, torch.float32)
    assert weights.quant is not None
    short = dataclasses.replace(weights.quant, gate_up_scale=weights.quant.gate_up_scale[:, :-1])  # type: ignore[index]
    with pytest.raises(ValueError, match=r"a scale is .* expected 2 by 64 by 2"):
        call(RUNNABLE[0], config, dataclasses.replace(weights, quant=short), x, routing)
