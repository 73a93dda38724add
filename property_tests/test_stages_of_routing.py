"""The stage route, compared bitwise: dtypes of gate and scores, weights of shared experts, and the chosen back-end."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moe_fn
from moe_fn import MoEConfig, MoEWeights, RouterConfig, RouterWeights, Routing, SharedExpertsConfig, reference
from moe_fn.config import ZeroExpertsConfig
from moe_fn.kernels.native import library as native
from moe_fn.kernels.native import support as on_cpu
from moe_fn.kernels.triton import support as gpu
from moe_fn.stages._scores import scores_of_logits
from moe_fn.stages.route import router_logits, weights_of_ids
from moe_fn.testing import assert_matches, configs

HALVES = (torch.bfloat16, torch.float16)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def layer(**changes: Any) -> MoEConfig:
    return MoEConfig(
        **({"num_experts": 6, "top_k": 3, "hidden_size": 16, "intermediate_size": 4, "backend": "torch"} | changes)
    )


def weights_of(config: MoEConfig, router: RouterWeights | None, dtype: torch.dtype = torch.float32) -> MoEWeights:
    experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    gate_up, down = random(experts, 2 * inner, hidden, dtype=dtype), random(experts, hidden, inner, dtype=dtype)
    return MoEWeights(gate_up=gate_up, down=down, router=router)


class Names(TorchDispatchMode):
    """Records the names of moe_fn's ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "moe_fn":
            self.seen.add(function._schema.name.partition("::")[2])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ("torch", "native"))
def test_the_gate_runs_where_the_config_says(backend: Any) -> None:
    if backend == "native" and native.active().problem is not None:
        pytest.skip("no native kernels here")
    config = layer(backend=backend)
    with Names() as names:
        router_logits(config, weights_of(config, RouterWeights(gate=random(6, 16))), random(5, 16))
    assert names.seen == ({"grouped_matmul_native"} if backend == "native" else set())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("precision", ("float32", "input"))
@pytest.mark.parametrize("has_bias", (False, True))
def test_the_gate_computes_in_its_dtype(dtype: torch.dtype, precision: Any, has_bias: bool) -> None:
    config, wide = layer(router=RouterConfig(gate_dtype=precision)), torch.float32 if precision == "float32" else dtype
    gate, bias, x = random(6, 16), random(6) if has_bias else None, random(5, 16, dtype=dtype)
    expected = x.to(wide) @ gate.to(wide).t()
    found = router_logits(config, weights_of(config, RouterWeights(gate=gate, bias=bias), dtype), x)
    assert found.dtype == wide and torch.equal(found, expected if bias is None else expected + bias.to(wide))


@pytest.mark.parametrize("router", (None, RouterWeights()))
def test_a_layer_without_logits_needs_a_gate(router: RouterWeights | None) -> None:
    config = layer()
    with pytest.raises(ValueError, match=r"logits and weights.router.gate are None; expected one of them"):
        router_logits(config, weights_of(config, router), random(5, 16))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("renormalize", (False, True))
def test_scores_are_computed_in_their_dtype_and_weights_are_float32(dtype: torch.dtype, renormalize: bool) -> None:
    config = layer(router=RouterConfig(score_dtype="input", renormalize=renormalize, routed_scaling_factor=2.0))
    scale, logits = random(6), random(5, 6, dtype=dtype)
    routing = moe_fn.route(config, weights_of(config, RouterWeights(expert_scale=scale)), logits)
    chosen = torch.softmax(logits, -1).gather(-1, routing.expert_ids)
    chosen = chosen / chosen.sum(-1, keepdim=True) if renormalize else chosen
    expected = chosen * scale.to(dtype)[routing.expert_ids] * 2.0
    assert routing.weights.dtype == torch.float32 and torch.equal(routing.weights, expected.float())


@pytest.mark.parametrize("factor", (1.0, 2.0, 2.5))
@pytest.mark.parametrize("scale_on", ("weights", "output"))
@pytest.mark.parametrize("renormalize", (False, True))
@pytest.mark.parametrize("has_scale", (False, True))
@pytest.mark.parametrize("zeros", (0, 2))
def test_shared_experts_are_weighted_as_the_routed_ones(
    factor: float, scale_on: Any, renormalize: bool, has_scale: bool, zeros: int
) -> None:
    router = RouterConfig(scoring="sigmoid", renormalize=renormalize, routed_scaling_factor=factor, scale_on=scale_on)
    if zeros and scale_on != "weights":
        pytest.skip("zero experts bypass the output's scale")
    shared = SharedExpertsConfig(intermediate_size=2, count=2, gate="router")
    config = layer(router=router, shared=shared, zero_experts=ZeroExpertsConfig(count=zeros) if zeros else None)
    choices = 6 + zeros
    scale, logits = random(choices + 2).abs() if has_scale else None, random(5, choices + 2)
    weights = weights_of(config, RouterWeights(expert_scale=scale))
    routing, expected = moe_fn.route(config, weights, logits), reference.route(config, weights, logits)
    assert torch.equal(routing.expert_ids, expected.expert_ids) and routing.shared_weights is not None
    assert routing.shared_weights.dtype == torch.float32
    assert_matches(routing.weights, expected.weights)
    assert_matches(routing.shared_weights, expected.shared_weights)
    masked = moe_fn.route(config, weights, logits, token_mask=torch.tensor([True, False, True, True, False]))
    assert masked.shared_weights is not None and (masked.shared_weights[[1, 4]] == 0).all()
    assert torch.equal(masked.shared_weights[[0, 2, 3]], routing.shared_weights[[0, 2, 3]])


@pytest.mark.parametrize("capacity", (1, 2))
def test_a_capacity_is_of_a_sequence_or_of_all_tokens(capacity: int) -> None:
    """First choices of all tokens are kept before second ones; -1 does not use capacity."""
    config = layer(num_experts=3, top_k=2, router=RouterConfig(capacity=capacity))
    logits = torch.tensor(
        [[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [2.0, 3.0, 1.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [3.0, 2.0, 1.0]]
    )
    mask = torch.tensor([True, True, True, True, True, False])
    for leading in (None, (6,), (2, 3), (1, 2, 3), (3, 2)):
        routing = moe_fn.route(config, weights_of(config, None), logits, token_mask=mask, leading=leading)
        free = moe_fn.route(layer(num_experts=3, top_k=2), weights_of(config, None), logits, token_mask=mask)
        length = 6 if leading is None else leading[-1]
        for first in range(0, 6, length):
            room = [capacity] * 3
            for choice in range(2):
                for token in range(first, first + length):
                    expert = int(free.expert_ids[token, choice])
                    fits = expert >= 0 and room[expert] > 0
                    room[expert] -= fits
                    assert routing.expert_ids[token, choice] == (expert if fits else -1)
                    assert routing.weights[token, choice] == (free.weights[token, choice] if fits else 0)


@settings(max_examples=15)
@given(configs(selection="top_k"))
def test_scores_for_losses_are_of_all_choices(config: MoEConfig) -> None:
    extra = 0 if config.shared is None or config.shared.gate != "router" else config.shared.count
    logits = random(5, config.num_choices + extra)
    router = config.router
    z = logits[:, : config.num_choices] * router.logit_multiplier
    z = z if router.logit_softcap is None else router.logit_softcap * torch.tanh(z / router.logit_softcap)
    scores = {
        "softmax": lambda: torch.softmax(z, -1),
        "sigmoid": lambda: torch.sigmoid(z),
        "sqrtsoftplus": lambda: torch.nn.functional.softplus(z).sqrt(),
        "identity": lambda: z,
    }[router.scoring]()
    assert_matches(scores_of_logits(config, logits), scores)


@pytest.mark.parametrize("order", (1.0, 2.0))
@pytest.mark.parametrize("epsilon", (0.0, 0.5))
@pytest.mark.parametrize("minimum", (0.0, 3.0))
def test_norms_of_weights_have_order_epsilon_and_minimum(order: float, epsilon: float, minimum: float) -> None:
    router = RouterConfig(
        scoring="sigmoid", renormalize_order=order, renormalize_epsilon=epsilon, renormalize_minimum=minimum
    )
    config, logits = layer(top_k=2, router=router), random(5, 6)
    routing = moe_fn.route(config, weights_of(config, None), logits)
    chosen = torch.sigmoid(logits).gather(-1, routing.expert_ids)
    norm = (chosen.abs() ** order).sum(-1, keepdim=True) ** (1 / order) + epsilon
    assert_matches(routing.weights, chosen / norm.clamp(min=minimum))
    zero_scores = moe_fn.route(
        layer(top_k=2, router=RouterConfig(scoring="identity")), weights_of(config, None), torch.zeros(1, 6)
    )
    assert (zero_scores.weights == 0).all(), "0 / 0"


def test_masked_tokens_go_nowhere() -> None:
    config, mask = layer(), torch.tensor([True, False, True])
    logits = torch.full((3, 6), torch.nan).index_fill(0, torch.tensor([0, 2]), 1.0)
    routing = moe_fn.route(config, weights_of(config, None), logits, token_mask=mask)
    assert isinstance(routing, Routing) and routing.expert_ids.tolist() == [[0, 1, 2], [-1, -1, -1], [0, 1, 2]]
    assert torch.isfinite(routing.weights).all() and (routing.weights[1] == 0).all()


@pytest.mark.parametrize("kernels", ("native", "triton"))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("scale", (False, True))
def test_the_kernels_that_route_have_the_values_and_gradients_of_torch(kernels: str, bias: bool, scale: bool) -> None:
    """torch's ops route if experts have a scale, which the kernels do not support."""
    if reason := {"native": on_cpu, "triton": gpu}[kernels].problem("cpu", torch.float32):
        pytest.skip(reason)
    router = RouterConfig(scoring="sigmoid", correction_bias="scores" if bias else "none", routed_scaling_factor=2.5)
    extra = RouterWeights(correction_bias=random(6) if bias else None, expert_scale=random(6) if scale else None)
    found = []
    for backend in ("torch", kernels):
        config, logits = layer(router=router, backend=backend), random(4, 6).requires_grad_()
        with Names() as names:
            routing = moe_fn.route(config, weights_of(config, extra), logits)
        assert any("route_top_k" in name for name in names.seen) == (backend == kernels and not scale)
        assert routing.shared_weights is None
        (routing.weights * random(4, 3)).sum().backward()
        found.append((routing.expert_ids, routing.weights.detach(), logits.grad))
        ids = routing.expert_ids
        with torch.autograd.forward_ad.dual_level():  # the kernels have no tangents: torch's ops route
            dual = moe_fn.route(
                config, weights_of(config, extra), torch.autograd.forward_ad.make_dual(random(4, 6), random(6, 4).t())
            )
            found[-1] += (torch.autograd.forward_ad.unpack_dual(dual.weights).tangent,)
    assert torch.equal(ids, found[0][0])
    for left, right in zip(*found, strict=True):
        assert_matches(left, right, tolerance=1e-5)


def test_a_mask_has_one_word_for_every_token() -> None:
    with pytest.raises(ValueError, match="token_mask"):
        moe_fn.route(layer(), weights_of(layer(), None), random(5, 6), token_mask=torch.ones(4, dtype=torch.bool))


def test_weights_of_a_choice_are_of_that_choice() -> None:
    """The weights are those of the given ids, not of the top-k of the logits."""
    config, logits = layer(router=RouterConfig(renormalize=False)), random(4, 6)
    ids = torch.tensor([[5, 0, 3]]).expand(4, 3)
    assert_matches(weights_of_ids(config, logits, None, ids), torch.softmax(logits, -1).gather(-1, ids))


def test_weights_of_shared_experts_are_float32_whatever_scores_are() -> None:
    shared = SharedExpertsConfig(intermediate_size=2, count=2, gate="router")
    config = layer(router=RouterConfig(scoring="sigmoid", score_dtype="input", renormalize=False), shared=shared)
    routing = moe_fn.route(config, weights_of(config, None), random(5, 8, dtype=torch.bfloat16))
    assert routing.shared_weights is not None and routing.shared_weights.dtype == torch.float32
