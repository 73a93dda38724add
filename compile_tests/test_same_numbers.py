"""Compiled layers have the results of eager mode, and the same bits in every run."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import moe_fn
from compile_tests.cases import FORMS, HIDDEN, Case, as_leaves, cases
from moe_fn import MoEWeights
from moe_fn.testing import assert_matches

# Inductor keeps float32 between operations; eager mode rounds after each.
INDUCTOR = {torch.float64: 1e-12, torch.bfloat16: 4e-2, torch.float16: 8e-3}  # float32: test_one_graph.py


def run(fn: Any, args: tuple[Any, ...]) -> tuple[Tensor, Any]:
    """Returns (value, args with gradients in the place of tensors, zeros for those without a gradient)."""
    leaves = as_leaves(args)
    y = fn(*leaves)
    seeds = torch.arange(1, y.numel() + 1, dtype=torch.float64).cos().reshape(y.shape).to(y.dtype)
    y.backward(seeds)
    gradient = lambda t: torch.zeros_like(t) if t.grad is None else t.grad
    return y.detach(), tree_map(lambda t: gradient(t) if isinstance(t, Tensor) else t, leaves)


DTYPE_OF = {"everything": torch.float32, "gpt_oss": torch.bfloat16, "deepseek": torch.float16, "default": torch.float64}


@cases()
def test_aot_eager_gives_the_bits_of_eager(case: Case) -> None:
    dtype = DTYPE_OF[case.recipe]
    args = case.args(20, dtype)
    actual, expected = run(torch.compile(case.layer, backend="aot_eager", fullgraph=True), args), run(case.layer, args)
    assert actual[0].dtype == dtype
    assert_matches(actual, expected, tolerance=0.0)


@pytest.mark.parametrize("dtype", INDUCTOR, ids=str)
def test_inductor_gives_the_numbers_of_eager(dtype: torch.dtype) -> None:
    case = Case("default")
    args = case.args(20, dtype)
    actual, expected = run(torch.compile(case.layer, fullgraph=True), args), run(case.layer, args)
    assert_matches(actual, expected, tolerance=INDUCTOR[dtype], scale=0.1)


def test_the_same_inputs_give_the_same_bits_every_time() -> None:
    """With two threads and top_k = 4, a sum with atomics in forward or backward would differ between runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        config = replace(Case("default").config, top_k=4)
        args = Case("default").args(400)[:3]
        eager = lambda weights, x, logits: moe_fn.moe_forward(config, weights, x, logits)
        layer = torch.compile(eager, fullgraph=True)
        first = run(layer, args)
        for _ in range(4):
            assert_matches(run(layer, args), first, tolerance=0.0)
        assert_matches(first, run(eager, args), tolerance=1e-5)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("size", "opaque"),
    # a last chunk that is not full, chunks of one token, one chunk for all, and a scan
    [(7, True), *(pytest.param(*case, marks=pytest.mark.thorough) for case in ((1, True), (100, True), (7, False)))],
)
def test_chunks_of_any_size_change_nothing_when_compiled(size: int, opaque: bool) -> None:
    case = Case("deepseek")
    config = replace(case.config, chunk_tokens=size, opaque=opaque)
    layer = torch.compile(
        lambda weights, x, logits: moe_fn.moe_forward(config, weights, x, logits), backend="aot_eager", fullgraph=True
    )
    for tokens in (20, 14):
        args = case.args(tokens)[:3]
        assert_matches(run(layer, args), run(case.layer, args), tolerance=1e-5, scale=1e-2)


@cases(("everything",))
def test_gradients_have_the_dtype_shape_and_layout_of_their_weights(case: Case) -> None:
    args = case.args(20, torch.bfloat16)
    for fn in (case.layer, torch.compile(case.layer, backend="aot_eager", fullgraph=True)):
        _, gradients = run(fn, args)

        def check(weight: Any, gradient: Any) -> None:
            if isinstance(weight, Tensor) and weight.is_floating_point():
                assert (gradient.dtype, gradient.shape, gradient.stride()) == (
                    weight.dtype,
                    weight.shape,
                    weight.stride(),
                )

        tree_map(check, args, gradients)
        assert gradients[0].gate_up.abs().max() > 0


def strided(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the same values, with the last two dimensions in the opposite order in memory."""

    def turn(t: Any) -> Any:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2) if isinstance(t, Tensor) and t.ndim > 1 else t

    return tree_map(turn, args)


@cases(("default",))
def test_strides_of_the_inputs_change_nothing(case: Case) -> None:
    args = case.args(20)
    turned = strided(args)
    expected = case.layer(*args)
    assert_matches(case.layer(*turned), expected)
    leaves = tree_map(
        lambda t: t.detach().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t, turned
    )
    y = torch.compile(case.layer, backend="aot_eager", fullgraph=True)(*leaves)
    y.sum().backward()
    assert_matches(y, expected)
    assert leaves[0].gate_up.grad.shape == args[0].gate_up.shape


@pytest.mark.parametrize("form", FORMS)
def test_one_compiled_function_serves_changing_weights(form: str) -> None:
    case = Case("deepseek", form)
    layer = torch.compile(case.layer, backend="aot_eager", fullgraph=True)
    x, logits, _ = case.token_args(9)
    weights = case.weights()
    for scale in (1.0, 0.5, 2.0):
        scaled: MoEWeights = tree_map(lambda t, s=scale: t * s, weights)
        assert torch.equal(layer(scaled, x, logits), case.layer(scaled, x, logits))
    assert x.shape == (9, HIDDEN)
