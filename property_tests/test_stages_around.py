"""Norms, the latent space and the experts' network compared with plain torch, bitwise in half precision: where each
rounds, and which tensors it reads.
"""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moe_fn
from moe_fn import (
    ActivationConfig,
    ActivationQuantConfig,
    Dispatched,
    ExpertNormConfig,
    LatentConfig,
    LatentWeights,
    MoEConfig,
    MoEWeights,
    NormsConfig,
    QuantConfig,
)
from moe_fn.stages._activation import activate
from moe_fn.stages.transform import norm_for_gate, norm_output, transform_input, transform_output
from moe_fn.testing import assert_matches, weights_for

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPSILON = 0.25  # large, so that it changes the result


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def layer(**changes: Any) -> MoEConfig:
    return MoEConfig(
        **({"num_experts": 3, "top_k": 1, "hidden_size": 6, "intermediate_size": 4, "backend": "torch"} | changes)
    )


def normed(x: Tensor, scale: Tensor | None) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
    return (wide if scale is None else wide * scale).to(x.dtype)


def weights_of(config: MoEConfig, dtype: torch.dtype, **rest: Any) -> MoEWeights:
    wide, inner = config.expert_hidden_size, config.intermediate_size
    return MoEWeights(gate_up=random(3, 2 * inner, wide, dtype=dtype), down=random(3, wide, inner, dtype=dtype), **rest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bias", "norm", "padding"), list(itertools.product((False, True), (False, True), (0, 2))))
def test_the_latent_space_is_two_products_with_norms(dtype: torch.dtype, bias: bool, norm: bool, padding: int) -> None:
    config = layer(latent=LatentConfig(size=5, norm_epsilon=EPSILON), hidden_padding=padding)
    latent = LatentWeights(input=random(5, 6, dtype=dtype), output=random(6, 5, dtype=dtype))
    if bias:
        latent = dataclasses.replace(latent, input_bias=random(5, dtype=dtype), output_bias=random(6, dtype=dtype))
    if norm:
        latent = dataclasses.replace(latent, input_norm=random(5), output_norm=random(5).flip(0))
    weights, x, routed = weights_of(config, dtype, latent=latent), random(7, 6, dtype=dtype), random(7, 5, dtype=dtype)
    v = x @ latent.input.t()
    v = v if latent.input_bias is None else v + latent.input_bias
    v = v if latent.input_norm is None else normed(v, latent.input_norm)
    assert torch.equal(transform_input(config, weights, x), F.pad(v, (0, padding)))
    r = routed if latent.output_norm is None else normed(routed, latent.output_norm)
    y = r @ latent.output.t()
    assert torch.equal(
        transform_output(config, weights, routed), y if latent.output_bias is None else y + latent.output_bias
    )
    without = dataclasses.replace(weights, latent=None)
    assert (
        torch.equal(transform_input(config, without, x), F.pad(x, (0, padding)))
        and transform_output(config, without, routed) is routed
    )
    plain = layer(hidden_padding=padding)
    assert (
        torch.equal(transform_input(plain, weights, x), F.pad(x, (0, padding)))
        and transform_output(plain, weights, routed) is routed
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ("input", "gate", "output"))
def test_each_norm_stands_in_its_place_alone(dtype: torch.dtype, which: str) -> None:
    config = layer(norms=NormsConfig(epsilon=EPSILON, **{which: True}))
    weights, x = (
        weights_of(config, dtype, input_norm=random(6), output_norm=random(6).flip(0)),
        random(7, 6, dtype=dtype),
    )
    found = (transform_input(config, weights, x), norm_for_gate(config, x), norm_output(config, weights, x))
    expected = {
        "input": normed(x, weights.input_norm),
        "gate": normed(x, None),
        "output": normed(x, weights.output_norm),
    }
    for name, value in zip(expected, found, strict=True):
        assert torch.equal(value, expected[name] if name == which else x)
        assert value.dtype == dtype
    plain = layer()
    assert (
        transform_input(plain, weights, x) is x and norm_for_gate(plain, x) is x and norm_output(plain, weights, x) is x
    )


def sorted_rows(dtype: torch.dtype) -> Dispatched:
    """Returns 2 rows of the first expert, 3 of the last, and 2 of no expert, which are NaN."""
    rows = random(7, 6, dtype=dtype)
    rows[5:] = torch.nan
    order = torch.arange(7)
    return Dispatched(
        rows=rows, expert_ends=torch.tensor([2, 2, 5], dtype=torch.int32), slot_of_row=order, row_of_slot=order
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("layout", "bias", "norm"),
    list(itertools.product(("out_in", "in_out"), (None, "own", "wide"), (None, "before", "after"))),
)
def test_the_network_of_an_expert_rounds_after_its_products_and_biases(
    dtype: torch.dtype, layout: Any, bias: str | None, norm: Any
) -> None:
    config = layer(
        weight_layout=layout, expert_norm=None if norm is None else ExpertNormConfig(scale=norm, epsilon=EPSILON)
    )
    weights, d = weights_of(config, dtype), sorted_rows(dtype)
    kind = torch.float32 if bias == "wide" else dtype
    if bias is not None:
        weights = dataclasses.replace(
            weights, gate_up_bias=random(3, 8, dtype=kind), down_bias=random(3, 6, dtype=kind)
        )
    if norm is not None:
        weights = dataclasses.replace(weights, expert_norm=random(3, 6))
    given = (
        weights
        if layout == "out_in"
        else dataclasses.replace(weights, gate_up=weights.gate_up.mT, down=weights.down.mT)
    )
    found = moe_fn.experts(config, given, d)
    assert found.dtype == dtype and (found[5:] == 0).all()
    for expert, part in ((0, slice(0, 2)), (2, slice(2, 5))):
        hidden = (d.rows[part] @ weights.gate_up[expert].t()).float()
        hidden = hidden if weights.gate_up_bias is None else hidden + weights.gate_up_bias[expert]
        gate, up = hidden.chunk(2, -1)
        out = (F.silu(gate) * up).to(dtype) @ weights.down[expert].t()
        out = out if weights.down_bias is None else (out.float() + weights.down_bias[expert]).to(dtype)
        if weights.expert_norm is not None:
            scale, wide = weights.expert_norm[expert], out.float()
            wide = wide * scale if norm == "before" else wide
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
            out = (wide * scale if norm == "after" else wide).to(dtype)
        assert torch.equal(found[part], out)


def test_a_norm_of_experts_needs_its_config_and_its_scales() -> None:
    weights, d, config = (
        weights_of(layer(), torch.float32),
        sorted_rows(torch.float32),
        layer(expert_norm=ExpertNormConfig()),
    )
    plain, with_scales = moe_fn.experts(layer(), weights, d), dataclasses.replace(weights, expert_norm=random(3, 6))
    for needs, given in ((layer(), with_scales), (config, weights)):
        with pytest.raises(ValueError, match=r"weights\.expert_norm is"):
            moe_fn.experts(needs, given, d)
    assert not torch.equal(moe_fn.experts(config, with_scales, d), plain)


@pytest.mark.parametrize("alpha", (1.0, 1.7, 2.0))
@pytest.mark.parametrize("limit_at", (None, "input", "output"))
@pytest.mark.parametrize("offset", (0.0, 1.0))
@pytest.mark.parametrize("layout", ("packed", "interleaved"))
def test_silu_with_all_its_parameters(alpha: float, limit_at: Any, offset: float, layout: str) -> None:
    limit = None if limit_at is None else 0.6  # small, so that gates and ups of both signs reach it
    at = {} if limit_at is None else {"limit": limit, "limit_at": limit_at}
    activation, h = ActivationConfig(function="silu", alpha=alpha, up_offset=offset, **at), 2 * random(3, 5, 8)
    gate, up = (h[..., :4], h[..., 4:]) if layout == "packed" else (h[..., ::2], h[..., 1::2])
    gate = gate.clamp(max=limit) if limit_at == "input" else gate
    gate = gate * torch.sigmoid(alpha * gate)
    gate = gate.clamp(max=limit) if limit_at == "output" else gate
    up = up if limit is None else up.clamp(-limit, limit)
    torch.testing.assert_close(activate(activation, h, layout), gate * (up + offset))


@pytest.mark.parametrize("granularity", ("tensor", "token"))
def test_inputs_are_rounded_by_the_scale_that_is_kept_where_there_is_one(granularity: Any) -> None:
    kept = granularity == "tensor"
    activations = ActivationQuantConfig(scheme="int8", granularity=granularity, static=kept)
    config = layer(quant=QuantConfig(scheme="int8", granularity="channel", activations=activations))
    weights, d = weights_for(config), sorted_rows(torch.float32)
    assert weights.quant is not None and (weights.quant.gate_up_input_scale is not None) == kept
    if weights.quant.gate_up_input_scale is not None:  # a different, coarse scale for every product and expert
        coarse = {name: 0.05 * (1 + random(3).abs()) for name in ("gate_up_input_scale", "down_input_scale")}
        weights = dataclasses.replace(weights, quant=dataclasses.replace(weights.quant, **coarse))
    x, routing = (
        d.rows[:5],
        moe_fn.Routing(expert_ids=torch.tensor([[0], [0], [2], [2], [2]]), weights=torch.ones(5, 1)),
    )
    expected = moe_fn.reference.moe_forward_routed(config, weights, x, routing)
    assert_matches(moe_fn.experts(config, weights, d)[:5], expected, scale=0.1)


def test_rows_of_nobody_have_no_part_in_the_scale_of_all_rows() -> None:
    config = layer(
        quant=QuantConfig(
            scheme="int8",
            granularity="channel",
            activations=ActivationQuantConfig(scheme="int8", granularity="tensor", static=False),
        )
    )
    weights, d = weights_for(config), sorted_rows(torch.float32)
    alone = dataclasses.replace(d, rows=d.rows[:5] * torch.tensor([[1.0], [1.0], [9.0], [1.0], [1.0]]))
    more = dataclasses.replace(d, rows=torch.cat([alone.rows, torch.full((2, 6), 1e3)]))
    assert torch.equal(moe_fn.experts(config, weights, more)[:5], moe_fn.experts(config, weights, alone))
    routing = moe_fn.Routing(expert_ids=torch.tensor([[0], [0], [2], [2], [2]]), weights=torch.ones(5, 1))
    assert_matches(
        moe_fn.experts(config, weights, alone),
        moe_fn.reference.moe_forward_routed(config, weights, alone.rows, routing),
        scale=1.0,
    )
