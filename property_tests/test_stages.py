"""Dtypes, devices and roundings of all stages, compared bitwise.

These tests detect mutants that pass tests with tolerances.
"""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from support import with_gradients
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import moe_fn
from moe_fn import (
    Dispatched,
    ExpertNormConfig,
    GroupConfig,
    LatentConfig,
    LoRAConfig,
    MoEConfig,
    MoEWeights,
    NormsConfig,
    RouterConfig,
    Routing,
    SharedExpertsConfig,
    SharedWeights,
    ZeroExpertsConfig,
)
from moe_fn.stages.dispatch import weighted
from moe_fn.stages.join import addends, join
from moe_fn.stages.shared import shared_experts
from moe_fn.stages.zero_experts import zero_experts
from moe_fn.testing import MoEProblem, problems, weights_for

HALVES = (torch.bfloat16, torch.float16)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def layer(**changes: Any) -> MoEConfig:
    return MoEConfig(**({"num_experts": 4, "top_k": 4, "hidden_size": 6, "intermediate_size": 8} | changes))


def in_order(rows: Tensor, experts: int) -> Dispatched:
    """Returns rows sorted by expert, the same number for each."""
    order = torch.arange(len(rows))
    ends = torch.arange(1, experts + 1, dtype=torch.int32) * (len(rows) // experts)
    return Dispatched(rows=rows, expert_ends=ends, slot_of_row=order, row_of_slot=order)


RICH: dict[str, dict[str, Any]] = {  # without codes: torch without CUDA cannot index a fake tensor
    "everything around": {
        "top_k": 3,
        "router": RouterConfig(capacity=2, correction_bias="scores", logit_softcap=5.0),
        "zero_experts": ZeroExpertsConfig(count=2, kind="constant"),
        "latent": LatentConfig(size=4),
        "norms": NormsConfig(input=True, output=True, gate=True),
        "shared": SharedExpertsConfig(intermediate_size=4, gate="sigmoid"),
        "expert_norm": ExpertNormConfig(),
    },
    "groups": {
        "top_k": 2,
        "router": RouterConfig(scoring="sigmoid", groups=GroupConfig(count=2, top_k=1, score="top2_sum")),
    },
    "mixer": {"top_k": 2, "router": RouterConfig(selection="sparsemixer", renormalize=False)},
    "adapters": {"top_k": 2, "lora": LoRAConfig(num_adapters=3, rank=2)},
}


@pytest.mark.parametrize("name", RICH)
def test_no_stage_makes_a_tensor_on_another_device(name: str) -> None:
    """Values of fake tensors cannot be read, so no stage waits for a device either."""
    config = layer(backend="torch", **RICH[name])
    adapters = torch.zeros(5, dtype=torch.int64) if config.lora is not None else None
    arguments = (
        weights_for(config),
        random(5, 6),
        random(5, config.num_logits),
        torch.ones(5, dtype=torch.bool),
        adapters,
    )
    with FakeTensorMode():
        weights, x, logits, token_mask, adapter_ids = tree_map(
            lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda") if isinstance(t, Tensor) else t, arguments
        )
        y = moe_fn.moe_forward(config, weights, x, logits, token_mask=token_mask, adapter_ids=adapter_ids)
        assert y.device == x.device
        if config.lora is None:
            stats = moe_fn.moe_forward_with_stats(config, weights, x, logits, token_mask=token_mask)[1]
            assert stats.expert_load.device == x.device


@given(problems(dtype=torch.bfloat16))
@settings(max_examples=25)
def test_stages_keep_the_dtype_of_tokens_and_weigh_in_float32(problem: MoEProblem) -> None:
    problem = with_gradients(problem)
    y, routing = problem.call(moe_fn.moe_forward), problem.call(moe_fn.moe_forward_with_stats)[1]
    assert y.dtype == torch.bfloat16 and routing.router_z_loss.dtype == torch.float32
    config, tokens = problem.config, problem.x.reshape(-1, problem.x.shape[-1])
    call = moe_fn.layer.call.check_and_flatten(
        "test", config, problem.weights, problem.x, problem.logits, problem.token_ids, problem.token_mask
    )
    _, routing = moe_fn.layer.compose.route_tokens(
        config, problem.weights, tokens, call.logits, call.token_ids, call.token_mask
    )
    assert routing.weights.dtype == torch.float32 and routing.expert_ids.dtype == torch.int64
    assert routing.shared_weights is None or routing.shared_weights.dtype == torch.float32
    assert all(
        part.dtype == torch.bfloat16
        for part in moe_fn.layer.compose.parts_of_tokens(config, problem.weights, tokens, routing)
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_combine_multiplies_and_sums_in_float32_whatever_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    config, rows, weights = layer(), random(40, 6, dtype=dtype), random(10, 4, dtype=dtype)
    routing = Routing(expert_ids=torch.arange(4).expand(10, 4), weights=weights)
    expected = (rows.view(10, 4, 6).float() * weights.float().unsqueeze(-1)).sum(1).to(dtype)
    assert torch.equal(moe_fn.combine(config, rows, in_order(rows, 4), routing), expected)


@pytest.mark.parametrize("weight_on", ("input", "output"))
def test_ids_below_zero_and_from_num_experts_on_are_nobodys(weight_on: Any) -> None:
    config, x = layer(router=RouterConfig(weight_on=weight_on)), random(3, 6)
    routing = Routing(expert_ids=torch.tensor([[0, 4, 5, -1]]).expand(3, 4), weights=random(3, 4))
    d = moe_fn.dispatch(config, x, routing)
    assert d.expert_ends.tolist() == [3, 3, 3, 3]
    rows = d.rows.index_fill(0, torch.arange(3, 12), torch.nan)
    assert torch.equal(moe_fn.combine(config, rows, d, routing), x * routing.weights[:, :1])


@pytest.mark.parametrize("dtype", HALVES)
def test_weighted_inputs_are_rounded_once(dtype: torch.dtype) -> None:
    x, weights = random(10, 6, dtype=dtype), random(10, 1)
    assert torch.equal(weighted(layer(), x, weights), (x.float() * weights).to(dtype))


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.int16, torch.int32))
def test_ids_may_be_of_a_dtype_that_has_no_word_for_no_expert(dtype: torch.dtype) -> None:
    """The dtype cannot represent num_experts, the sort key of ids of no expert."""
    experts = 256 if dtype == torch.uint8 else 128
    config = layer(num_experts=experts, top_k=1)
    routing = Routing(expert_ids=torch.tensor([[experts - 1], [0], [5]], dtype=dtype), weights=torch.ones(3, 1))
    d = moe_fn.dispatch(config, torch.zeros(3, 1), routing)
    assert d.slot_of_row.tolist() == [1, 2, 0] and d.expert_ends[-1] == 3 and d.expert_ends.dtype == torch.int32


@pytest.mark.parametrize("dtype", (*HALVES, torch.float32))
def test_both_parts_are_added_up_in_the_dtype_of_the_routed_one(dtype: torch.dtype) -> None:
    routed, shared = random(10, 6, dtype=dtype), random(10, 6, dtype=dtype)
    assert torch.equal(join(routed, shared), (routed.float() + shared.float()).to(dtype))
    assert join(routed, shared).dtype == dtype and join(routed, None) is routed


@pytest.mark.parametrize("gamma", (0.5, 1.0, 2.0, 3.0))
@pytest.mark.parametrize("scale_on", ("weights", "output", "output_float16_safe"))
def test_the_output_is_scaled_by_every_factor(gamma: float, scale_on: Any) -> None:
    config = layer(router=RouterConfig(routed_scaling_factor=gamma, scale_on=scale_on))
    routed, shared = random(5, 6), random(6, 5).t()
    scaled, same = addends(config, routed, shared, lambda t: t + 1)
    assert torch.equal(scaled, (routed if scale_on == "weights" else routed * gamma) + 1) and same is shared


def test_columns_are_those_of_the_last_dimension() -> None:
    y = random(3, 2, 5)
    assert torch.equal(moe_fn.reduce_and_trunc(y, width=4), y[..., :4])
    assert moe_fn.reduce_and_trunc(y, width=5) is y and moe_fn.reduce_and_trunc(y) is y
    with pytest.raises(ValueError, match="y has 5 columns; expected at least width=6"):
        moe_fn.reduce_and_trunc(y, width=6)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ("identity", "constant"))
@pytest.mark.parametrize("of_weights", (torch.float32, None))
def test_zero_experts_are_added_in_float32(dtype: torch.dtype, kind: Any, of_weights: torch.dtype | None) -> None:
    """The ids of 2 zero experts are 4 and 5; 6 and -1 are ids of no expert. Each constant expert has its own vector."""
    config = layer(zero_experts=ZeroExpertsConfig(count=2, kind=kind))
    constants = random(2, 6, dtype=dtype)
    weights = MoEWeights(gate_up=torch.zeros(4, 16, 6), down=torch.zeros(4, 6, 8), constants=constants)
    routing = Routing(
        expert_ids=torch.tensor([[4, 6, 5, -1]]).expand(7, 4), weights=random(7, 4, dtype=of_weights or dtype)
    )
    x, y, w = random(7, 6, dtype=dtype), random(7, 6, dtype=dtype).flip(0), routing.weights.float()
    added = (w[:, :1] + w[:, 2:3]) * x.float() if kind == "identity" else w[:, [0, 2]] @ constants.float()
    found = zero_experts(config, weights, x, routing, y)
    assert found.dtype == dtype and torch.equal(found, (y.float() + added).to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("gate", ("none", "sigmoid", "router"))
@pytest.mark.parametrize("biases", (None, "own", "float32"))
def test_shared_experts_round_between_their_products_alone(dtype: torch.dtype, gate: Any, biases: str | None) -> None:
    """Shared experts have weights of the router only if gate="router"."""
    router = RouterConfig(scoring="sigmoid")
    config = layer(router=router, shared=SharedExpertsConfig(intermediate_size=4, count=2, gate=gate))
    new = lambda *shape: random(*shape, dtype=dtype)
    dense = SharedWeights(gate_up=new(16, 6), down=new(6, 8), gate=new(1, 6))
    if biases is not None:
        kind = dtype if biases == "own" else torch.float32
        dense = dataclasses.replace(dense, gate_up_bias=random(16, dtype=kind), down_bias=random(6, dtype=dtype))
    weights = MoEWeights(gate_up=torch.zeros(4, 16, 6), down=torch.zeros(4, 6, 8), shared=dense)
    x, w = new(9, 6), random(9, 2)
    routing = Routing(expert_ids=torch.full((9, 4), -1), weights=torch.zeros(9, 4), shared_weights=w)
    hidden = (x @ dense.gate_up.t()).float()
    gates, ups = (hidden if dense.gate_up_bias is None else hidden + dense.gate_up_bias).chunk(2, -1)
    hidden = torch.nn.functional.silu(gates) * ups
    hidden = (hidden.view(9, 2, 4) * w.view(9, 2, 1)).view(9, 8) if gate == "router" else hidden
    y = hidden.to(dtype) @ dense.down.t()
    y = y if dense.down_bias is None else y + dense.down_bias
    y = (y.float() * torch.sigmoid(x.float() @ dense.gate.float().t())).to(dtype) if gate == "sigmoid" else y
    found = shared_experts(config, weights, x, routing)
    assert found is not None and torch.equal(found, y)
    assert shared_experts(layer(), weights, x, routing) is None
    assert shared_experts(config, dataclasses.replace(weights, shared=None), x, routing) is None
