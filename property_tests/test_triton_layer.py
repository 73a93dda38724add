"""Laws of the whole layer on the Triton back-end, in Triton's interpreter if there is no GPU."""

import dataclasses
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import gradients
from torch import Tensor

import moe_fn
from moe_fn import LoRAConfig, MoEConfig, MoEWeights, Routing
from moe_fn.config import ExpertNormConfig, RouterConfig
from moe_fn.testing import MoEProblem, assert_matches, configs, problems, weights_for

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = settings(max_examples=10)
FLOATS = (torch.float32, torch.float16)  # the interpreter multiplies bfloat16 as integers
# on a GPU if there is one; `make test-gpu` runs them too
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []


def on_triton(dtype: torch.dtype, **fixed: Any) -> Any:
    fixed = {"backend": "triton", "opaque": False, "gate_dtype": "float32", "score_dtype": "float32"} | fixed
    return problems(configs(**fixed), dtype=dtype, device=DEVICE)


@FEW
@given(st.one_of(*(on_triton(dtype) for dtype in FLOATS)))
def test_the_layer_equals_the_reference(problem: MoEProblem) -> None:
    assert_matches(problem.call(moe_fn.moe_forward), problem.call(moe_fn.reference.moe_forward), scale=0.1)


@settings(max_examples=6)
@given(
    on_triton(
        torch.float32, lora=st.sampled_from([LoRAConfig(num_adapters=3, rank=3), LoRAConfig(rank=1, experts="shared")])
    )
)
def test_adapters_equal_the_reference(problem: MoEProblem) -> None:
    assert_matches(problem.call(moe_fn.moe_forward), problem.call(moe_fn.reference.moe_forward), scale=0.1)


@FEW
@given(on_triton(torch.float32, chunk_tokens=None), st.booleans())
def test_gradients_equal_the_reference(problem: MoEProblem, recompute: bool) -> None:
    problem = problem.with_config(recompute=recompute and problem.config.expert_norm is None)
    expected = problem.call(moe_fn.reference.moe_forward)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    actual = gradients(problem, moe_fn.moe_forward, direction)
    for a, e in zip(actual, gradients(problem, moe_fn.reference.moe_forward, direction), strict=True):
        finite = torch.isfinite(e)  # the derivative of a NaN logit is undefined
        assert_matches(a[finite], e[finite].to(a.dtype), tolerance=1e-5, scale=0.1)


def plain_problem(
    tokens: int, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[MoEConfig, MoEWeights, Tensor, Tensor]:
    sizes: dict[str, Any] = {"num_experts": 5, "top_k": 2, "hidden_size": 40, "intermediate_size": 24} | changes
    config = MoEConfig(backend="triton", **sizes)
    torch.manual_seed(tokens)
    weights = torch.utils._pytree.tree_map(lambda t: t.to(DEVICE, dtype), weights_for(config))
    return (
        config,
        weights,
        torch.randn(tokens, 40, device=DEVICE, dtype=dtype),
        torch.randn(tokens, config.num_logits, device=DEVICE),
    )


@pytest.mark.parametrize("tokens", [0, 1, 3, 40])
@pytest.mark.parametrize("num_experts", [1, 5, 64])  # with 64 experts one token runs without sorting
def test_kernels_equal_the_stages(tokens: int, num_experts: int) -> None:
    config, weights, x, logits = plain_problem(tokens, num_experts=num_experts, top_k=min(2, num_experts))
    routing = moe_fn.route(config, weights, logits)
    routing = Routing(expert_ids=routing.expert_ids.where(routing.weights > 0.3, -1), weights=routing.weights)
    assert_matches(
        moe_fn.fused.routed_experts.routed_experts(config, weights, x, routing),
        moe_fn.fused.routed_experts.dispatch_experts_combine(config, weights, x, routing),
        scale=1.0,
    )


def test_an_expert_norm_runs_by_stages() -> None:
    config, weights, x, logits = plain_problem(7, expert_norm=ExpertNormConfig())
    assert_matches(
        moe_fn.moe_forward(config, weights, x, logits),
        moe_fn.reference.moe_forward(config, weights, x, logits),
        scale=1.0,
    )


def test_transforms_of_torch_func() -> None:
    config, weights, x, logits = plain_problem(6)
    plain = dataclasses.replace(config, backend="torch")

    def loss(config: MoEConfig, x: Tensor, gate_up: Tensor) -> Tensor:
        return moe_fn.moe_forward(config, dataclasses.replace(weights, gate_up=gate_up), x, logits).square().sum()

    def everything(config: MoEConfig) -> list[Tensor]:
        first = torch.func.grad(lambda x: loss(config, x, weights.gate_up))
        of_samples = torch.func.vmap(torch.func.grad(lambda x: loss(config, x, weights.gate_up)))(torch.stack([x, -x]))
        tangent = torch.func.jvp(lambda x: loss(config, x, weights.gate_up), (x,), (torch.ones_like(x),))[1]
        second = torch.func.grad(lambda x: first(x).square().sum())(x)
        of_weights = torch.func.vmap(torch.func.grad(lambda w: loss(config, x, w)))(
            torch.stack([weights.gate_up, -weights.gate_up])
        )
        return [first(x), of_samples, tangent, second, of_weights]

    for actual, expected in zip(everything(config), everything(plain), strict=True):
        assert_matches(actual, expected, scale=float(expected.abs().max()), tolerance=1e-5)


def test_gradients_of_gradients() -> None:
    config, weights, x, logits = plain_problem(6)

    def second(config: MoEConfig) -> Tensor:
        at = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(
            moe_fn.moe_forward(config, weights, at, logits).square().sum(), at, create_graph=True
        )
        return torch.autograd.grad(first.square().sum(), at)[0]

    expected = second(dataclasses.replace(config, backend="torch"))
    assert_matches(second(config), expected, scale=float(expected.abs().max()), tolerance=1e-5)


@pytest.mark.parametrize(
    "router",
    [
        RouterConfig(),
        RouterConfig(renormalize=False, routed_scaling_factor=2.5),
        RouterConfig(scoring="sigmoid", correction_bias="scores", renormalize_epsilon=1e-20),
        RouterConfig(scoring_order="after_top_k", logit_softcap=3.0, renormalize=False),
    ],
)
def test_the_router_kernel_and_its_gradient(router: RouterConfig) -> None:
    config, weights, _, logits = plain_problem(9, num_experts=8, top_k=3, router=router)
    plain = dataclasses.replace(config, backend="torch")

    def routed(config: MoEConfig) -> tuple[Routing, Tensor]:
        at = logits.clone().requires_grad_()
        routing = moe_fn.route(config, weights, at)
        return routing, torch.autograd.grad((routing.weights * torch.arange(3, device=DEVICE)).sum(), at)[0]

    (actual, d_actual), (expected, d_expected) = routed(config), routed(plain)
    assert torch.equal(actual.expert_ids, expected.expert_ids)
    assert_matches(actual.weights, expected.weights, scale=1.0)
    assert_matches(d_actual, d_expected, scale=1.0)


def test_the_same_inputs_give_the_same_bits() -> None:
    config, weights, x, logits = plain_problem(70)
    x.requires_grad_()
    runs = [torch.autograd.grad(moe_fn.moe_forward(config, weights, x, logits).sum(), x)[0] for _ in range(2)]
    assert torch.equal(*runs)


def _dot_in_order(builder: Any, a: Any, b: Any, total: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """Returns a @ b + total with one order of sums for all rows of a: numpy's BLAS, which the interpreter
    calls, sums the rows of a tile in several orders.

    Like numpy, it sums a tile before it adds the total, so that bits depend on the sizes of tiles.
    """
    product = sum(np.outer(column, row) for column, row in zip(a.data.T, b.data, strict=True))
    return type(total)(product + total.data, total.dtype.scalar)


@pytest.mark.parametrize(
    ("in_out", "tokens"),
    [
        pytest.param(False, 24, id="out_in"),
        pytest.param(True, 40, id="in_out, 40 tokens", marks=pytest.mark.thorough),
        pytest.param(False, 40, id="out_in, 40 tokens", marks=pytest.mark.thorough),
    ],
)
def test_batch_invariant_tokens_have_the_same_bits_in_any_batch(
    in_out: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are from one token, which would use the small-batch kernels, to sizes that would get larger tiles."""
    if DEVICE == "cpu":
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot_in_order)
    layout: Any = "in_out" if in_out else "out_in"
    config, weights, x, logits = plain_problem(tokens, num_experts=8, batch_invariant=True, weight_layout=layout)

    def run(index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        one = x[index].clone().requires_grad_()
        # without gradients few rows use the small-batch kernels
        alone = moe_fn.moe_forward(config, weights, one.detach(), logits[index])
        y = moe_fn.moe_forward(config, weights, one, logits[index])
        return alone, y.detach(), torch.autograd.grad(y.square().sum(), one)[0]

    expected = run(torch.arange(tokens))
    for index in (torch.tensor([17]), torch.tensor([3, 23, 17]), torch.arange(tokens - 1, tokens // 4, -1)):
        for found, all_of_them in zip(run(index), expected, strict=True):
            assert torch.equal(found, all_of_them[index])
