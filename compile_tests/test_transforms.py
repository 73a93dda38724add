"""The layer below torch.func, autograd's own transforms, checkpointing, autocast and data parallelism."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import moe_fn
from compile_tests.cases import EVERY, FORMS, HIDDEN, IN_STAGES_AND_IN_ONE_OP, Case, as_leaves, cases
from moe_fn import MoEConfig, MoEWeights
from moe_fn.records import leaves_of_weights, weights_of_leaves
from moe_fn.testing import assert_matches, weights_for

BOTH = ("default", "everything")
CHUNKED = ("chunked", "opaque_chunked")
ONCE_ONLY = ("opaque", "opaque_chunked")  # forms without a second derivative and without forward mode


def compiled(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(fn, **({"backend": "aot_eager", "fullgraph": True} | options))


def loss_of(case: Case) -> Callable[..., Tensor]:
    """The loss of (weights, x, logits, mask): its gradient has no two entries alike."""
    layer = case.layer

    def loss(weights: MoEWeights, x: Tensor, logits: Tensor | None = None, token_mask: Tensor | None = None) -> Tensor:
        y = layer(weights, x, logits, token_mask)
        return (y * torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).cos()).sum()

    return loss


def assert_alike(actual: Any, expected: Any) -> None:
    assert_matches(actual, expected, tolerance=1e-5, scale=1.0)


def asked(case: Case, argnums: Any) -> Any:
    """Without the logits where the gate is inside."""
    return {2: 0, (0, 1, 2): (0, 1)}.get(argnums, argnums) if case.token_args(1)[1] is None else argnums


def assert_not_zero(found: Any) -> None:
    first = found[0] if isinstance(found, tuple) else found
    assert (first.gate_up if isinstance(first, MoEWeights) else first).abs().max() > 0.1


# func.grad. With respect to the weights alone a library op wrapped in an autograd.Function gives zeros, silently.
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
# in stages and in one op. `found` above is what eager gives for the others too.
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


@cases(BOTH, often=(("default", "plain"), ("default", "opaque")))  # where Dynamo may break: in stages, around the op
def test_func_grad_under_plain_compile_is_the_same(case: Case) -> None:
    args = case.args(20)
    assert_alike(compiled(grad(loss_of(case)), fullgraph=False)(*args), grad(loss_of(case))(*args))


def batch_of(case: Case, size: int = 3, tokens: int = 9) -> tuple[Any, ...]:
    """(x, logits, mask), each with a batch dimension in front."""
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
    """The layer as a module: its parameters are all floating tensors of MoEWeights."""

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
    """(floating tensors of args, a function that puts others in their place)."""
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


def gradients(fn: Callable[..., Tensor], args: tuple[Any, ...]) -> Any:
    """(value, gradients like args) with zeros where nothing flows."""
    leaves = as_leaves(args)
    value = fn(*leaves)
    value.square().sum().backward()
    zero = lambda t: t.grad if t.grad is not None else torch.zeros_like(t)
    return value.detach(), tree_map(lambda t: zero(t) if isinstance(t, Tensor) else t, leaves)


@cases(BOTH)
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_changes_nothing_in_eager(case: Case, use_reentrant: bool) -> None:
    args = case.args(20)
    checkpointed = lambda *args: checkpoint(case.layer, *args, use_reentrant=use_reentrant)
    if use_reentrant:  # it sees tensors that are arguments themselves, not inside a dataclass
        checkpointed = lambda weights, *rest: checkpoint(
            lambda *leaves: case.layer(weights_of_leaves(list(leaves[:-3])), *leaves[-3:]), *leaves_of_weights(weights),
            *rest,
            use_reentrant=True,
        )  # fmt: skip
    assert_alike(gradients(checkpointed, args), gradients(case.layer, args))


@cases(BOTH, often=IN_STAGES_AND_IN_ONE_OP)
def test_checkpointing_changes_nothing_compiled(case: Case) -> None:
    args, layer = case.args(20), case.layer
    checkpointed = compiled(lambda *args: checkpoint(layer, *args, use_reentrant=False))
    assert_alike(gradients(checkpointed, args), gradients(layer, args))


@cases(BOTH, ("plain", "chunked"), often=(("default", "plain"), ("default", "chunked")))
def test_autocast_around_the_compiled_layer_is_that_of_eager(case: Case) -> None:
    """Gradients too: of a product in float32 AOTAutograd traces the backward under autocast."""
    layer = replace(case, backend="torch").layer
    args, calls = case.args(20), (layer, compiled(layer))
    in_autocast = [torch.autocast("cpu", dtype=torch.bfloat16)(call) for call in calls]
    expected, actual = (gradients(call, args) for call in in_autocast)
    assert_matches(actual, expected, tolerance=0.0)


def test_autocast_moves_no_token_to_other_experts_in_any_form() -> None:
    config = MoEConfig(num_experts=64, top_k=4, hidden_size=64, intermediate_size=8)
    weights, x = weights_for(config), torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    expected = moe_fn.moe_forward(config, weights, x)
    for form in FORMS.values():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = moe_fn.moe_forward(replace(config, **form), weights, x)
        assert_matches(y, expected, tolerance=1e-2)


@cases(BOTH, often=IN_STAGES_AND_IN_ONE_OP)
def test_autocast_is_the_same_compiled_and_keeps_the_dtype_of_x(case: Case) -> None:
    args, layer = case.args(20), case.layer

    def autocast_layer(*args: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(*args)

    expected = gradients(autocast_layer, args)
    actual = gradients(compiled(autocast_layer), args)
    assert expected[0].dtype == actual[0].dtype == torch.float32
    assert_matches(actual, expected, tolerance=0.0)
    assert not torch.equal(expected[0], layer(*args))  # the experts did compute in bfloat16
    assert_matches(expected[0], layer(*args), tolerance=4e-2)


@pytest.fixture
def _warnings_are_errors() -> Iterator[None]:
    torch.set_warn_always(True)  # or torch says each once in a process
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    torch.set_warn_always(False)


@cases(("default", "everything"))
@pytest.mark.usefixtures("_warnings_are_errors")
def test_nothing_warns_in_eager_nor_below_transforms(case: Case) -> None:
    gradients(case.layer, case.args(20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        case.layer(*case.args(20))
    batch = batch_of(case)
    for backend in ("auto", "torch"):
        per_sample = vmap(grad(loss_of(replace(case, backend=backend))), (None, *in_dims_of(*batch)))
        per_sample(case.weights(), *batch)


@cases(("default",))
def test_no_grad_and_inference_mode_change_nothing(case: Case) -> None:
    args = case.args(20)
    expected = case.layer(*as_leaves(args)).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(case.layer(*args), expected)


@cases(("default",), often=IN_STAGES_AND_IN_ONE_OP)
def test_no_grad_and_inference_mode_change_nothing_compiled(case: Case) -> None:
    args = case.args(20)
    expected = case.layer(*as_leaves(args)).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(compiled(case.layer)(*args), expected, rtol=0, atol=0)
        torch._dynamo.reset()


@pytest.mark.parametrize(
    "form", ["plain", "opaque", "chunked", pytest.param("opaque_chunked", marks=pytest.mark.thorough)]
)
def test_inference_mode_compiles_with_inductor(form: str) -> None:
    case = Case("default", form)
    args = case.args(20)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(case.layer, fullgraph=True)(*args), case.layer(*args))


@cases(BOTH)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["deepcopy", "pickle"]
)
def test_copies_of_config_and_weights_do_as_well(case: Case, copied: Callable[[Any], Any]) -> None:
    config, args = case.config, case.args(9)
    twin = copied(config)
    assert twin == config and hash(twin) == hash(config) and twin.json == config.json
    y = moe_fn.moe_forward(twin, copied(args[0]), args[1], args[2], token_mask=args[3])
    assert torch.equal(y, case.layer(*args))


def test_weights_move_and_map_as_a_pytree() -> None:
    weights = Case("everything").weights()
    wide = tree_map(lambda t: t.to(torch.float64), weights)
    assert isinstance(wide, MoEWeights)
    assert {t.dtype for t in tree_leaves(wide)} == {torch.float64}
    assert len(tree_leaves(weights)) == sum(leaf is not None for leaf in leaves_of_weights(weights))


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("form", ["plain", "opaque", *(pytest.param(f, marks=pytest.mark.thorough) for f in CHUNKED)])
@pytest.mark.usefixtures("one_process")
def test_data_parallel_changes_nothing_also_compiled(form: str) -> None:
    case = Case("deepseek", form)
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(0))
    alone = Layer(case.config, case.weights())
    alone(x).square().sum().backward()
    wanted = [p.grad for p in alone.parameters()]
    for wrap in (lambda model: model, lambda model: compiled(model, fullgraph=False)):
        parallel = nn.parallel.DistributedDataParallel(Layer(case.config, case.weights()), find_unused_parameters=True)
        model = wrap(parallel)
        model(x).square().sum().backward()
        for parameter, want in zip(parallel.parameters(), wanted, strict=True):
            zeros = torch.zeros_like(parameter)
            assert_alike(zeros if parameter.grad is None else parameter.grad, zeros if want is None else want)
        torch._dynamo.reset()


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("form", ["plain", "opaque"])
@pytest.mark.usefixtures("one_process")
def test_fully_sharded_parameters_change_nothing_also_compiled(form: str) -> None:
    from torch.distributed.fsdp import fully_shard

    case = Case("deepseek", form)
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(0))
    expected = Layer(case.config, case.weights())(x)
    for compile_it in (False, True):
        model = Layer(case.config, case.weights())
        if compile_it:
            model.compile(backend="aot_eager")
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        y = model(x)
        assert_alike(y, expected)
        y.square().sum().backward()
        assert model.leaves[0].grad is not None
        torch._dynamo.reset()
