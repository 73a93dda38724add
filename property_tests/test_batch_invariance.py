"""batch_invariant=True: a token's output and gradient are bitwise equal in any batch."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import config_with, flat, law, leaves
from torch import Tensor

import moe_fn
from moe_fn import LoRAConfig, MoEConfig, MoEWeights, RouterWeights, SharedExpertsConfig
from moe_fn.testing import MoEProblem, configs, problems
from moe_fn.testing.quant_strategies import quants

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
INVARIANT = st.one_of(*(problems(configs(batch_invariant=True), dtype=dtype) for dtype in DTYPES))
ORDERS = st.integers(0, 2**20)


def some_tokens(problem: MoEProblem, seed: int) -> Tensor:
    """Draws the tokens of another batch: some of these tokens, in another order, some of them twice."""
    count = problem.x[..., 0].numel()
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randint(0, 2 * count + 1, (), generator=generator)
    return torch.randint(0, max(count, 1), (int(wanted) if count else 0,), generator=generator)


def outputs(problem: MoEProblem) -> Tensor:
    return flat(problem.call(moe_fn.moe_forward), 1)  # type: ignore[return-value]


def token_gradients(problem: MoEProblem) -> list[Tensor]:
    """Returns the gradients of x and logits, [tokens, ...], for a loss that weights each element of a token's output
    the same in any batch.
    """
    fresh = {
        name: None if t is None else t.detach().clone().requires_grad_()
        for name, t in (("x", problem.x), ("logits", problem.logits))
    }
    y = problem.replace(**fresh).call(moe_fn.moe_forward)
    direction = torch.arange(1, y.shape[-1] + 1, dtype=torch.float64).cos().to(y.dtype).expand(y.shape)
    found = torch.autograd.grad(y, leaves(fresh), direction, allow_unused=True)
    return [flat(torch.zeros_like(t) if g is None else g, 1) for t, g in zip(leaves(fresh), found, strict=True)]  # type: ignore[misc]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether all elements are equal; NaN equals NaN."""
    return torch.equal(torch.nan_to_num(one, nan=12345.0), torch.nan_to_num(other, nan=12345.0))


@law(INVARIANT, ORDERS)
def test_a_batch_invariant_token_has_the_same_bits_in_any_batch(problem: MoEProblem, seed: int) -> None:
    index = some_tokens(problem, seed)
    expected = outputs(problem)[index]
    assert same_bits(outputs(problem.of_tokens(index)), expected)
    assert same_bits(outputs(config_with(problem.of_tokens(index), chunk_tokens=1 + seed % 3)), expected)


@law(INVARIANT, ORDERS)
def test_a_batch_invariant_gradient_has_the_same_bits_in_any_batch(problem: MoEProblem, seed: int) -> None:
    index = some_tokens(problem, seed)
    for found, expected in zip(token_gradients(problem.of_tokens(index)), token_gradients(problem), strict=True):
        assert same_bits(found, expected[index])


SIZES: dict[str, Any] = {
    "hidden_size": st.sampled_from((4, 12)),
    "intermediate_size": st.sampled_from((2, 8)),
    "latent": None,
}
SIZES |= {"hidden_padding": 0, "weight_layout": "out_in", "batch_invariant": True}
QUANTIZED = quants(of_call=False).flatmap(lambda quant: problems(configs(quant=quant, **SIZES), dtype=torch.float32))
ADAPTED = problems(
    configs(lora=st.sampled_from([LoRAConfig(num_adapters=3, rank=3), LoRAConfig(rank=2)]), **SIZES),
    dtype=torch.float32,
)


@pytest.mark.parametrize("strategy", [QUANTIZED, ADAPTED], ids=["quantized", "adapted"])
def test_quantized_and_adapted_tokens_too(strategy: st.SearchStrategy[MoEProblem]) -> None:
    @settings(max_examples=30)
    @given(strategy, ORDERS)
    def check(problem: MoEProblem, seed: int) -> None:
        index = some_tokens(problem, seed)
        batch = problem.of_tokens(index)
        assert same_bits(outputs(batch), outputs(problem)[index])
        for found, expected in zip(token_gradients(batch), token_gradients(problem), strict=True):
            assert same_bits(found, expected[index])

    check()


@functools.cache
def model(dtype: torch.dtype, layout: Any) -> tuple[MoEConfig, MoEWeights]:
    """Returns a layer with sizes at which kernels have tails, sums of several blocks, and separate code for
    few rows.
    """
    shared = SharedExpertsConfig(intermediate_size=96, gate="sigmoid")
    config = MoEConfig(
        num_experts=16,
        top_k=4,
        hidden_size=1800,
        intermediate_size=200,
        weight_layout=layout,
        shared=shared,
        batch_invariant=True,
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_up": (16, 400, 1800), "down": (16, 1800, 200)}
    tensors = {
        name: torch.randn(*shape, generator=generator).to(dtype) / shape[2] ** 0.5 for name, shape in shapes.items()
    }
    tensors = tensors if layout == "out_in" else {name: t.mT.contiguous() for name, t in tensors.items()}
    gate = torch.randn(16, 1800, generator=generator).to(dtype) / 40
    dense = moe_fn.SharedWeights(
        gate_up=torch.randn(192, 1800, generator=generator).to(dtype) / 40,
        down=torch.randn(1800, 96, generator=generator).to(dtype) / 10,
        gate=torch.randn(1, 1800, generator=generator).to(dtype) / 40,
    )
    return config, MoEWeights(**tensors, router=RouterWeights(gate=gate), shared=dense)


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_token_of_many(dtype: torch.dtype, layout: Any, prepared: bool) -> None:
    config, weights = model(dtype, layout)
    x = torch.randn(700, 1800, generator=torch.Generator().manual_seed(1)).to(dtype)
    some = torch.tensor([0, 699, 350, 7, 8])
    weights = moe_fn.prepare_weights(config, weights) if prepared else weights
    expected = moe_fn.moe_forward(config, weights, x)[some]
    for place, token in enumerate(some):
        assert torch.equal(moe_fn.moe_forward(config, weights, x[token : token + 1])[0], expected[place])
    assert torch.equal(moe_fn.moe_forward(config, weights, x[some]), expected)


def test_the_gradient_of_one_token_of_many() -> None:
    config, weights = model(torch.float32, "out_in")
    x = torch.randn(200, 1800, generator=torch.Generator().manual_seed(1))

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(moe_fn.moe_forward(config, weights, x).square().sum(), x)[0]

    expected = gradient(x)
    assert torch.equal(gradient(x[150:151]), expected[150:151]) and torch.equal(gradient(x[3:90]), expected[3:90])


def test_stats_and_both_parts_have_the_bits_of_the_layer() -> None:
    config, weights = model(torch.float32, "out_in")
    x = torch.randn(5, 1800, generator=torch.Generator().manual_seed(1))
    y = moe_fn.moe_forward(config, weights, x)
    assert torch.equal(moe_fn.moe_forward_with_stats(config, weights, x)[0], y)
    parts = moe_fn.moe_forward_shared(config, weights, x)
    for one, all_of_them in zip(moe_fn.moe_forward_shared(config, weights, x[2:3]), parts, strict=True):
        assert torch.equal(one, all_of_them[2:3])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_moves_no_bit(threads: int) -> None:
    config, weights = model(torch.float32, "out_in")
    x = torch.randn(64, 1800, generator=torch.Generator().manual_seed(1))
    expected, before = moe_fn.moe_forward(config, weights, x), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(moe_fn.moe_forward(config, weights, x), expected)
    finally:
        torch.set_num_threads(before)


def test_without_the_option_the_plain_functions_run() -> None:
    config, weights = model(torch.float32, "out_in")
    plain = dataclasses.replace(config, batch_invariant=False)
    x = torch.randn(9, 1800, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        moe_fn.moe_forward(plain, weights, x), moe_fn.moe_forward(config, weights, x), rtol=1e-4, atol=1e-4
    )
