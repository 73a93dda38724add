"""Transforms of autograd around an eager layer: tangents, batches of gradients, hooks, compiled autograd, and
gradients of selected inputs only.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.compiled_autograd
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.autograd.graph import allow_mutation_on_saved_tensors, save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

import moe_fn
from compile_tests.cases import HIDDEN, INTERMEDIATE, NUM_EXPERTS, Case, as_leaves, cases
from moe_fn import QuantConfig, add_lora, make_lora, quantize_weights
from moe_fn.testing import assert_matches

BOTH = ("default", "everything")
DIFFERENTIABLE_TWICE = ("plain", "chunked")
Layer = Callable[..., Tensor]


def quantized(dtype: torch.dtype) -> tuple[Layer, tuple[Any, ...]]:
    case = Case("deepseek", backend="auto")
    config, weights = quantize_weights(
        case.config, case.weights(dtype), QuantConfig(scheme="int8", granularity="channel")
    )
    return partial(moe_fn.moe_forward, config), (weights, *case.token_args(4, dtype)[:2])


def adapted(dtype: torch.dtype) -> tuple[Layer, tuple[Any, ...]]:
    case, generator = Case("default"), torch.Generator().manual_seed(2)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(NUM_EXPERTS, *shape, generator=generator, dtype=torch.float64).to(dtype) / 3

    gate_up, down = (matrix(2, HIDDEN), matrix(2 * INTERMEDIATE, 2)), (matrix(2, INTERMEDIATE), matrix(HIDDEN, 2))
    config, weights = add_lora(case.config, case.weights(dtype), [make_lora(gate_up=gate_up, down=down, alpha=1.0)])
    return partial(moe_fn.moe_forward, config), (weights, *case.token_args(4, dtype)[:2])


def of_case(case: Case, dtype: torch.dtype) -> tuple[Layer, tuple[Any, ...]]:
    return case.layer, case.args(4, dtype)


PROBLEMS: dict[str, Callable[[torch.dtype], tuple[Layer, tuple[Any, ...]]]] = {
    **{str(case): partial(of_case, case) for case in (Case(r, f) for r in BOTH for f in DIFFERENTIABLE_TWICE)},
    "quantized": quantized,
    "adapted": adapted,
}
problems = pytest.mark.parametrize("problem", PROBLEMS)


def by_tensors(name: str, dtype: torch.dtype) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Returns the layer as a function of its floating tensors, without scales of codes, which have no gradients."""
    layer, args = PROBLEMS[name](dtype)
    leaves, structure = tree_flatten(args)
    fixed = {id(t) for t in tree_flatten(args[0].quant)[0]}
    places = [
        i
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and id(leaf) not in fixed
    ]

    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(places, tensors, strict=True))
        return layer(*tree_unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)], structure))

    return function, [leaves[i] for i in places]


@problems
def test_derivatives_of_every_mode_agree_with_finite_differences(problem: str) -> None:
    """gradcheck of reverse and forward mode (dual tensors), and of batches of both (torch's older vmap)."""
    function, tensors = by_tensors(problem, torch.float64)
    assert torch.autograd.gradcheck(
        function, [t.requires_grad_() for t in tensors], fast_mode=True,
        check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True,
    )  # fmt: skip


@problems
def test_dual_tensors_have_the_tangents_of_the_torch_back_end(problem: str) -> None:
    """In float32, where the kernels of "auto" run, for each tensor separately."""

    def tangents(dtype: torch.dtype) -> list[Tensor]:
        function, tensors = by_tensors(problem, dtype)
        found = []
        for place, tensor in enumerate(tensors):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(tensor, torch.ones_like(tensor).cumsum(-1).cos())
                tangent = forward_ad.unpack_dual(function(*tensors[:place], dual, *tensors[place + 1 :])).tangent
                found.append(torch.zeros(4, HIDDEN, dtype=dtype) if tangent is None else tangent.clone())
        return found

    for actual, expected in zip(tangents(torch.float32), tangents(torch.float64), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
    assert max(float(t.abs().max()) for t in tangents(torch.float32)) > 0.1


@problems
def test_linearized_and_vectorized_are_the_jacobian(problem: str) -> None:
    function, tensors = by_tensors(problem, torch.float32)
    x = tensors[-2] if tensors[-1].shape[-1] != HIDDEN else tensors[-1]
    place = next(i for i, t in enumerate(tensors) if t is x)

    def of_x(x: Tensor) -> Tensor:
        return function(*tensors[:place], x, *tensors[place + 1 :])

    expected = jacobian(of_x, x)
    for strategy in ("reverse-mode", "forward-mode"):
        torch.testing.assert_close(jacobian(of_x, x, vectorize=True, strategy=strategy), expected, rtol=1e-4, atol=1e-5)
    direction = x.cos()
    _, linear = torch.func.linearize(of_x, x)
    torch.testing.assert_close(
        linear(direction), torch.einsum("abcd,cd->ab", expected, direction), rtol=1e-4, atol=1e-5
    )

    def loss(x: Tensor) -> Tensor:
        return of_x(x).square().sum()

    twice = hessian(loss, x)
    torch.testing.assert_close(
        hessian(loss, x, vectorize=True, outer_jacobian_strategy="forward-mode"), twice, rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(torch.func.hessian(loss)(x), twice, rtol=1e-3, atol=1e-4)


def loss_of(y: Tensor) -> Tensor:
    return (y * torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).cos()).sum()


def floating(args: Any) -> list[Tensor]:
    return [t for t in tree_flatten(args)[0] if isinstance(t, Tensor) and t.is_floating_point()]


@cases(BOTH)
def test_a_batch_of_gradients_is_the_loop(case: Case) -> None:
    args = as_leaves(case.args(5))
    y = case.layer(*args)
    directions = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(4))

    def pull(v: Tensor, **options: Any) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(y, floating(args), v, retain_graph=True, allow_unused=True, **options)
        return tuple(torch.zeros(()) if g is None else g for g in found)

    expected = [torch.stack(parts) for parts in zip(*(pull(v) for v in directions), strict=True)]
    for batched in (pull(directions, is_grads_batched=True), torch.vmap(pull)(directions)):
        for g, e in zip(batched, expected, strict=True):
            assert_matches(g.expand(e.shape), e, tolerance=1e-5, scale=1.0)


@cases(BOTH)
@pytest.mark.parametrize("around", [save_on_cpu, allow_mutation_on_saved_tensors, torch.autograd.detect_anomaly])
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_contexts_of_autograd_may_stand_around_a_whole_step(case: Case, around: Any) -> None:
    args, expected = as_leaves(case.args(20)), as_leaves(case.args(20))
    loss_of(case.layer(*expected)).backward()
    with around():
        loss_of(case.layer(*args)).backward()
    for t, e in zip(floating(args), floating(expected), strict=True):
        assert (t.grad is None) == (e.grad is None) and (t.grad is None or torch.equal(t.grad, e.grad))


@pytest.mark.parametrize("form", DIFFERENTIABLE_TWICE)
def test_hooks_may_stand_around_a_second_derivative(form: str) -> None:
    case = Case("default", form)

    def second(hooks: Any) -> Tensor:
        weights, x, logits, _ = as_leaves(case.args(5))
        with hooks():
            (first,) = torch.autograd.grad(loss_of(case.layer(weights, x, logits)), x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), weights.gate_up)[0]

    torch.testing.assert_close(second(save_on_cpu), second(torch.enable_grad), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["plain", "opaque", pytest.param("chunked", marks=pytest.mark.thorough)])
def test_compiled_autograd_runs_the_backward_of_eager_layers(form: str) -> None:
    """Two layers differ also in arguments that are not tensors: torch identifies a backward by its function,
    and must not run the backward of the other layer.
    """
    for case in (Case("default", form), Case("gpt_oss", form)):
        args, expected = as_leaves(case.args(20)), as_leaves(case.args(20))
        loss_of(case.layer(*expected)).backward()
        loss = loss_of(case.layer(*args))
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        for t, e in zip(floating(args), floating(expected), strict=True):
            assert (t.grad is None) == (e.grad is None)
            if t.grad is not None:
                assert_matches(t.grad, e.grad, tolerance=1e-5, scale=1.0)


class Seen(TorchDispatchMode):
    """Records the package's ops that run: names, and the flags of gradients that they compute."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[bool]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "moe_fn":
            self.calls.append((func._opname, next((a for a in args if isinstance(a, list)), [])))
        return func(*args, **(kwargs or {}))

    def count(self, start: str) -> int:
        return sum(name.startswith(start) for name, _ in self.calls)

    def gradients(self) -> int:
        return sum(sum(needed) for _, needed in self.calls)


# Grouped products and outer products for the gradient of one tensor only.
PRODUCTS = {"x": (2, 0), "gate_up": (1, 1), "down": (0, 1), "logits": (0, 0)}


@pytest.mark.parametrize("form", ["plain", "chunked", "opaque", "opaque_chunked"])
@pytest.mark.parametrize("backend", ["torch", "native"])  # the Triton op has the same list of flags as the native one
@pytest.mark.parametrize("wanted", PRODUCTS)
def test_only_gradients_that_are_asked_for_are_computed(wanted: str, backend: Any, form: str) -> None:
    case = Case("default", form, backend)
    weights, x, logits, _ = as_leaves(case.args(6))
    tensors = {"x": x, "gate_up": weights.gate_up, "down": weights.down, "logits": logits}
    loss = loss_of(case.layer(weights, x, logits))
    every = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True)
    with Seen() as seen:
        (alone,) = torch.autograd.grad(loss, tensors[wanted])
    assert torch.equal(alone, every[list(tensors).index(wanted)])
    if backend == "native" or form.startswith("opaque"):
        assert seen.gradients() == 1
    else:
        products, outers = PRODUCTS[wanted]
        again = 2 if form == "chunked" else 0  # the chunk's forward
        assert (seen.count("grouped_matmul"), seen.count("grouped_outer")) == (again + products, outers)


def test_below_torch_func_only_gradients_that_are_asked_for_are_computed() -> None:
    case = Case("default", backend="native")
    weights, x, logits, _ = case.args(6)
    with Seen() as seen:
        torch.func.grad(lambda down: loss_of(case.layer(replace(weights, down=down), x, logits)))(weights.down)
    assert seen.count("grouped_matmul") == 2  # the first product again, and the gradient of the activation's output


def test_backward_into_some_inputs_computes_theirs_alone() -> None:
    case = Case("default", backend="native")
    weights, x, logits, _ = as_leaves(case.args(6))
    loss = loss_of(case.layer(weights, x.tanh(), logits))
    with Seen() as seen:
        loss.backward(inputs=[x])
    assert seen.gradients() == 1 and x.grad is not None and weights.gate_up.grad is None
