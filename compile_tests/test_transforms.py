"""The layer below torch.func and autograd's own transforms."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils._pytree import tree_map

import moe_fn
from compile_tests.cases import EVERY, FORMS, IN_STAGES_AND_IN_ONE_OP, Case, as_leaves, cases
from moe_fn import MoEConfig, MoEWeights
from moe_fn.records import leaves_of_weights, weights_of_leaves
from moe_fn.testing import assert_matches

BOTH = ("default", "everything")
CHUNKED = ("chunked", "opaque_chunked")
ONCE_ONLY = ("opaque", "opaque_chunked")  # forms without second derivatives and forward mode


def compiled(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(fn, **({"backend": "aot_eager", "fullgraph": True} | options))


def loss_of(case: Case) -> Callable[..., Tensor]:
    """Returns a loss of (weights, x, logits, mask), with distinct elements in its gradient."""
    layer = case.layer

    def loss(weights: MoEWeights, x: Tensor, logits: Tensor | None = None, token_mask: Tensor | None = None) -> Tensor:
        y = layer(weights, x, logits, token_mask)
        return (y * torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).cos()).sum()

    return loss


def assert_alike(actual: Any, expected: Any) -> None:
    assert_matches(actual, expected, tolerance=1e-5, scale=1.0)


def asked(case: Case, argnums: Any) -> Any:
    """Returns argnums without the logits if the gate is inside the layer."""
    return {2: 0, (0, 1, 2): (0, 1)}.get(argnums, argnums) if case.token_args(1)[1] is None else argnums


def assert_not_zero(found: Any) -> None:
    first = found[0] if isinstance(found, tuple) else found
    assert (first.gate_up if isinstance(first, MoEWeights) else first).abs().max() > 0.1


# func.grad with respect to weights only: a library op in an autograd.Function would silently give zeros.
ARGNUMS = {"weights": 0, "x": 1, "logits": 2, "all": (0, 1, 2)}


@cases(BOTH, often=EVERY)
@pytest.mark.parametrize("argnums", ARGNUMS.values(), ids=ARGNUMS)
def test_func_grad_is_that_of_autograd_and_never_silently_zero(case: Case, argnums: Any) -> None:
    args, argnums = case.args(20), asked(case, argnums)
    found = grad(loss_of(case), argnums)(*args)
    leaves = as_leaves(args)
    loss_of(case)(*leaves).backward()
    by_autograd = tree_map(
        lambda t: torch.zeros_like(t) if t.grad is None else t.grad, leaves[0] if argnums == 0 else leaves[1]
    )
    if argnums in (0, 1):
        assert_alike(found, by_autograd)
    assert_not_zero(found)


# Compiled, as one graph: of the weights alone in stages, in chunks, in one op, and with every option; of all arguments
# in stages and in one op. `found` above has the results of eager mode for the others too.
OF_WEIGHTS = (*(("default", form) for form in FORMS), ("everything", "plain"))
GRADS = [
    pytest.param(
        Case(recipe, form), argnums, id=f"{name}-{recipe}-{form}",
        marks=[pytest.mark.thorough] * ((recipe, form) not in often),
    )
    for name, argnums in ARGNUMS.items()
    for often in [{"weights": OF_WEIGHTS, "all": OF_WEIGHTS[:2]}.get(name, ())]
    for recipe in BOTH
    for form in FORMS
]  # fmt: skip


@pytest.mark.parametrize(("case", "argnums"), GRADS)
def test_func_grad_is_the_same_compiled_and_never_silently_zero(case: Case, argnums: Any) -> None:
    args, argnums = case.args(20), asked(case, argnums)
    transformed = grad(loss_of(case), argnums)
    actual = compiled(transformed)(*args)
    assert_alike(actual, transformed(*args))
    assert_not_zero(actual)


@cases(
    BOTH, often=(("default", "plain"), ("default", "opaque"))
)  # Dynamo may break the graph in stages, and around the op
def test_func_grad_under_plain_compile_is_the_same(case: Case) -> None:
    args = case.args(20)
    assert_alike(compiled(grad(loss_of(case)), fullgraph=False)(*args), grad(loss_of(case))(*args))


def batch_of(case: Case, size: int = 3, tokens: int = 9) -> tuple[Any, ...]:
    """Returns (x, logits, mask), each with a leading batch dimension."""
    samples = [case.token_args(tokens, seed=seed) for seed in range(size)]
    return tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*samples, strict=True))


def in_dims_of(*args: Any) -> tuple[int | None, ...]:
    return tuple(None if a is None else 0 for a in args)


@cases(BOTH, often=EVERY)
def test_vmap_over_a_batch_is_the_loop(case: Case) -> None:
    weights, batch = case.weights(), batch_of(case)
    expected = torch.stack([case.layer(weights, *(None if a is None else a[b] for a in batch)) for b in range(3)])
    assert_alike(vmap(case.layer, (None, *in_dims_of(*batch)))(weights, *batch), expected)


@cases(BOTH, often=IN_STAGES_AND_IN_ONE_OP)
def test_vmap_over_a_batch_is_the_same_compiled(case: Case) -> None:
    weights, batch = case.weights(), batch_of(case)
    batched = vmap(case.layer, (None, *in_dims_of(*batch)))
    assert_alike(compiled(batched)(weights, *batch), batched(weights, *batch))


@cases(BOTH, ("plain", "opaque"))
def test_vmap_over_weights_is_the_loop(case: Case) -> None:
    members = [
        tree_map(lambda t, s=scale: t * s if t.is_floating_point() else t, case.weights()) for scale in (1.0, 0.5, 2.0)
    ]
    stacked = tree_map(lambda *parts: torch.stack(parts), *members)
    args = case.token_args(9)
    expected = torch.stack([case.layer(member, *args) for member in members])
    assert_alike(vmap(case.layer, (0, None, None, None))(stacked, *args), expected)


@cases(BOTH, often=EVERY)
def test_gradients_per_sample_are_the_loop(case: Case) -> None:
    weights, batch = case.weights(), batch_of(case)
    per_sample = vmap(grad(loss_of(case)), (None, *in_dims_of(*batch)))
    samples = [grad(loss_of(case))(weights, *(None if a is None else a[b] for a in batch)) for b in range(3)]
    assert_alike(per_sample(weights, *batch), tree_map(lambda *parts: torch.stack(parts), *samples))


@cases(BOTH, often=IN_STAGES_AND_IN_ONE_OP)
def test_gradients_per_sample_are_the_same_compiled(case: Case) -> None:
    weights, batch = case.weights(), batch_of(case)
    per_sample = vmap(grad(loss_of(case)), (None, *in_dims_of(*batch)))
    assert_alike(compiled(per_sample)(weights, *batch), per_sample(weights, *batch))


@cases(("default",))
def test_the_gradient_of_a_vmap_is_the_sum_of_gradients(case: Case) -> None:
    weights, batch = case.weights(), batch_of(case)
    total = grad(lambda weights: vmap(loss_of(case), (None, *in_dims_of(*batch)))(weights, *batch).sum())(weights)
    samples = [grad(loss_of(case))(weights, *(None if a is None else a[b] for a in batch)) for b in range(3)]
    assert_alike(total, tree_map(lambda *parts: torch.stack(parts).sum(0), *samples))


class Layer(nn.Module):
    """The layer as a module whose parameters are all floating tensors of MoEWeights."""

    def __init__(self, config: MoEConfig, weights: MoEWeights) -> None:
        super().__init__()
        self.config = config
        leaves = leaves_of_weights(weights)
        self.present = [leaf is not None for leaf in leaves]
        self.leaves = nn.ParameterList(nn.Parameter(leaf.clone()) for leaf in leaves if leaf is not None)

    def forward(self, x: Tensor, logits: Tensor | None = None, token_mask: Tensor | None = None) -> Tensor:
        leaves = iter(self.leaves)
        weights = weights_of_leaves([next(leaves) if there else None for there in self.present])
        return moe_fn.moe_forward(self.config, weights, x, logits, token_mask=token_mask)


@cases(BOTH, often=IN_STAGES_AND_IN_ONE_OP)
def test_functional_call_and_its_compiled_gradient_agree_with_autograd(case: Case) -> None:
    module, args = Layer(case.config, case.weights()), case.token_args(9)
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(module, parameters, args).square().sum()

    found = compiled(grad(loss))({name: p.detach() for name, p in parameters.items()})
    module(*args).square().sum().backward()
    assert_alike(found, {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()})


@cases(("default",))
def test_jacrev_is_the_jacobian(case: Case) -> None:
    weights, x, logits, _ = case.args(3)
    expected = torch.autograd.functional.jacobian(lambda x: case.layer(weights, x, logits), x)
    assert_alike(jacrev(lambda x: case.layer(weights, x, logits))(x), expected)


@cases(BOTH)
def test_forward_mode_agrees_with_the_jacobian_or_says_that_there_is_none(case: Case) -> None:
    weights, x, *rest = case.args(3, torch.float64)
    direction = torch.ones_like(x).cumsum(0).cos()

    def directional() -> Tensor:
        return jvp(lambda x: case.layer(weights, x, *rest), (x,), (direction,))[1]

    if case.form in ONCE_ONLY:
        with pytest.raises(ValueError, match=r"no forward mode; expected MoEConfig\(opaque=False"):
            directional()
        return
    step = 1e-6
    ahead, behind = (case.layer(weights, x + sign * step * direction, *rest) for sign in (1, -1))
    torch.testing.assert_close(directional(), (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)


@cases(("default", "deepseek"), ("plain",))
@pytest.mark.parametrize("through", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_forward_mode_of_kernels_is_that_of_the_torch_back_end(case: Case, through: Callable[..., Any]) -> None:
    weights, x, *rest = case.args(3)

    def directional(case: Case) -> Callable[[Tensor], Tensor]:
        layer = case.layer
        return lambda x: jvp(lambda x: layer(weights, x, *rest), (x,), (x.cos(),))[1]

    expected = directional(replace(case, backend="torch"))(x)
    torch.testing.assert_close(through(directional(case))(x), expected, rtol=1e-5, atol=1e-6)


@cases(BOTH)
def test_a_second_derivative_is_right_or_says_that_there_is_none(case: Case) -> None:
    args = as_leaves(case.args(3, torch.float64))

    def second() -> Tensor:
        (first,) = torch.autograd.grad(loss_of(case)(*args), args[1], create_graph=True)
        return torch.autograd.grad(first.square().sum(), args[1])[0]

    if case.form in ONCE_ONLY:
        with pytest.raises(ValueError, match=r"no second derivative; expected MoEConfig\(opaque=False"):
            second()
        return
    reference = as_leaves(case.args(3, torch.float64))
    (first,) = torch.autograd.grad(loss_of(Case(case.recipe))(*reference), reference[1], create_graph=True)
    assert_alike(second(), torch.autograd.grad(first.square().sum(), reference[1])[0])
    if case.form == "plain":
        nested = grad(lambda x: grad(loss_of(case), 1)(args[0], x, *args[2:]).square().sum())
        assert_alike(nested(args[1].detach()), second())


def differentiable(args: tuple[Any, ...]) -> tuple[list[Tensor], Callable[[tuple[Tensor, ...]], tuple[Any, ...]]]:
    """Returns (floating tensors of args, a function that replaces them)."""
    leaves, structure = torch.utils._pytree.tree_flatten(args)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def rebuild(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
        replaced = dict(zip(places, tensors, strict=True))
        return torch.utils._pytree.tree_unflatten([replaced.get(i, leaf) for i, leaf in enumerate(leaves)], structure)

    return [leaves[i].requires_grad_() for i in places], rebuild


@cases(often=EVERY)
def test_gradcheck_passes_in_float64_for_every_tensor(case: Case) -> None:
    tensors, rebuild = differentiable(case.args(5, torch.float64))
    assert torch.autograd.gradcheck(lambda *tensors: case.layer(*rebuild(tensors)), tensors, fast_mode=True)


@cases(forms=("plain",))
def test_gradgradcheck_passes_in_float64_for_every_tensor(case: Case) -> None:
    tensors, rebuild = differentiable(case.args(4, torch.float64))
    assert torch.autograd.gradgradcheck(lambda *tensors: case.layer(*rebuild(tensors)), tensors, fast_mode=True)
