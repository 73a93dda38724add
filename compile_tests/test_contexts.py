"""The layer in checkpointing, autocast, inference mode, copies, data parallelism and fully sharded parameters."""

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
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import moe_fn
from compile_tests.cases import FORMS, HIDDEN, IN_STAGES_AND_IN_ONE_OP, Case, as_leaves, cases
from compile_tests.test_transforms import BOTH, CHUNKED, Layer, assert_alike, batch_of, compiled, in_dims_of, loss_of
from moe_fn import MoEConfig, MoEWeights
from moe_fn.records import leaves_of_weights, weights_of_leaves
from moe_fn.testing import assert_matches, weights_for


def gradients(fn: Callable[..., Tensor], args: tuple[Any, ...]) -> Any:
    """Returns (value, gradients in the structure of args), with zeros for tensors without a gradient."""
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
    if use_reentrant:  # it handles tensors that are arguments, not those inside a dataclass
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
    """Gradients are equal too: AOTAutograd traces the backward of a float32 product under autocast."""
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
    assert not torch.equal(expected[0], layer(*args))  # the experts computed in bfloat16
    assert_matches(expected[0], layer(*args), tolerance=4e-2)


@pytest.fixture
def _warnings_are_errors() -> Iterator[None]:
    torch.set_warn_always(True)  # otherwise torch warns once in a process
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
