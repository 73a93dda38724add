"""The Triton kernels on a GPU, with the tiles of the device: every size of tile, every dtype, forward and backward,
compared with float64.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import moe_fn
from moe_fn import MoEConfig, MoEWeights
from moe_fn.testing import assert_matches, weights_for

pytestmark = pytest.mark.gpu

SHAPES = {  # experts, top_k, hidden, intermediate; rows per expert cover every row of the tables of tiles
    "fine": (64, 8, 512, 256),
    "coarse": (8, 2, 1024, 512),
    "odd": (16, 4, 360, 200),
    "one expert": (1, 1, 256, 128),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "packed": {},
    "gpt-oss": {"activation": "swigluoai", "gate_up_layout": "interleaved", "weight_layout": "in_out"},
    "not gated": {"activation": "relu2_no_mul"},
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
each = pytest.mark.parametrize(("shape", "options"), [(s, o) for s in SHAPES for o in OPTIONS], ids=str)


def problem(shape: str, options: str, tokens: int, dtype: torch.dtype) -> tuple[MoEConfig, MoEWeights, Tensor, Tensor]:
    experts, top_k, hidden, inner = SHAPES[shape]
    config = MoEConfig(
        num_experts=experts, top_k=top_k, hidden_size=hidden, intermediate_size=inner, **OPTIONS[options]
    )
    weights = replace(weights_for(config, seed=0, bias=options == "gpt-oss"), router=None)
    weights = tree_map(lambda t: t.to("cuda", dtype), weights)
    generator = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, hidden, device="cuda", generator=generator).to(dtype)
    return config, weights, x, torch.randn(tokens, experts, device="cuda", generator=generator)


def in_float64(config: MoEConfig, *tensors: Any) -> tuple[Any, ...]:
    wide = tree_map(lambda t: t.to(torch.float64) if isinstance(t, Tensor) and t.is_floating_point() else t, tensors)
    return replace(config, backend="torch"), *wide


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 8, 64, 500, 4096])
def test_the_layer_equals_float64(shape: str, options: str, tokens: int, dtype: torch.dtype) -> None:
    config, weights, x, logits = problem(shape, options, tokens, dtype)
    assert moe_fn.backends()[2].available
    routing = moe_fn.route(config, weights, logits)
    wide, wide_weights, wide_x = in_float64(config, weights, x)
    expected = moe_fn.moe_forward_routed(wide, wide_weights, wide_x, routing)
    assert_matches(
        moe_fn.moe_forward_routed(replace(config, backend="triton"), weights, x, routing), expected, scale=0.1
    )


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 2000])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_equal_float64(shape: str, options: str, tokens: int, dtype: torch.dtype, recompute: bool) -> None:
    config, weights, x, logits = problem(shape, options, tokens, dtype)
    routing = moe_fn.route(config, weights, logits)

    def gradients(config: MoEConfig, weights: MoEWeights, x: Tensor) -> list[Tensor]:
        weights, x, w = tree_map(lambda t: t.detach().requires_grad_(), (weights, x, routing.weights))
        inputs = [t for t in torch.utils._pytree.tree_leaves((weights, x, w)) if isinstance(t, Tensor)]
        y = moe_fn.moe_forward_routed(config, weights, x, replace(routing, weights=w))
        return list(torch.autograd.grad((y.to(torch.float64) * direction).sum(), inputs))

    direction = torch.randn(
        x.shape, dtype=torch.float64, device="cuda", generator=torch.Generator("cuda").manual_seed(1)
    )
    expected = gradients(*in_float64(config, weights, x))
    for actual, wanted in zip(
        gradients(replace(config, backend="triton", recompute=recompute), weights, x), expected, strict=True
    ):
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
        assert_matches(actual, wanted.to(actual.dtype), tolerance=tolerance, scale=float(wanted.square().mean().sqrt()))


@pytest.mark.parametrize("tokens", [1, 64, 2000])
def test_the_router_chooses_as_torch_does(tokens: int) -> None:
    config, weights, _, logits = problem("fine", "packed", tokens, torch.float32)
    logits = (logits * 4).round() / 4  # many ties
    actual, expected = (
        moe_fn.route(replace(config, backend=backend), weights, logits) for backend in ("triton", "torch")
    )
    assert torch.equal(actual.expert_ids, expected.expert_ids)
    assert_matches(actual.weights, expected.weights, scale=1.0)


@each
def test_the_same_inputs_give_the_same_bits(shape: str, options: str) -> None:
    config, weights, x, logits = problem(shape, options, 700, torch.bfloat16)
    weights, x = tree_map(lambda t: t.requires_grad_(), (weights, x))

    def run() -> list[Tensor]:
        y = moe_fn.moe_forward(replace(config, backend="triton"), weights, x, logits)
        return [y, *torch.autograd.grad(y.sum(), (x, weights.gate_up, weights.down))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
