"""Every op of the package meets the contract of torch.library: opcheck, a pure schema, and a docstring with the reason
why it exists.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import moe_fn
from compile_tests.cases import Case
from moe_fn.config import QuantConfig, RouterConfig
from moe_fn.config.activation import PRESETS
from moe_fn.kernels.arguments import ARGUMENTS, DIFFERENTIABLE, RoutedExpertsArguments, flat
from moe_fn.kernels.native import support as native
from moe_fn.kernels.triton import support as gpu
from moe_fn.records import LoRAWeights, QuantWeights, leaves_of_weights

for _module in pkgutil.walk_packages(moe_fn.__path__, "moe_fn."):  # an op is defined when its module is imported
    if "integrations" not in _module.name and not _module.name.startswith(
        ("moe_fn.testing", "moe_fn.bench", "moe_fn.kernels.triton")
    ):
        importlib.import_module(_module.name)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moe_fn::"))
WHY = ("why an op", "why ops", "why one op", "why it is an op")


def op_of(name: str) -> Any:
    namespace, _, rest = name.partition("::")
    name, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")


def make(seed: int, dtype: torch.dtype, requires_grad: bool) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)
    )


def ends(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def grouped_matmul(dtype: torch.dtype, requires_grad: bool) -> list[tuple[Any, ...]]:
    r = make(0, dtype, requires_grad)
    return [
        (r(7, 4), r(3, 4, 5), ends(2, 2, 6), False, 1, 1, False),  # an empty expert and a row of no expert
        (r(7, 4), r(3, 5, 4), ends(2, 2, 6), True, 1, 1, True),
        (r(0, 4), r(3, 4, 5), ends(0, 0, 0), False, 1, 1, False),
        (r(8, 4), r(2, 4, 5), ends(1, 4, 5, 8), False, 2, 1, True),
        (r(8, 4), r(4, 5, 4), ends(1, 3, 4, 7), True, 2, 2, False),
    ]


def grouped_outer(dtype: torch.dtype, requires_grad: bool) -> list[tuple[Any, ...]]:
    r = make(1, dtype, requires_grad)
    return [
        (r(7, 4), r(7, 5), ends(2, 2, 6), 1, 1),
        (r(0, 4), r(0, 5), ends(0, 0, 0), 1, 1),
        (r(8, 4), r(8, 5), ends(1, 4, 5, 8), 2, 1),
        (r(8, 4), r(8, 5), ends(1, 3, 4, 7), 2, 2),
    ]


def routed_experts(
    dtype: torch.dtype, requires_grad: bool, lowest_id: int = -1, codes: bool = False, adapters: bool = False
) -> list[tuple[Any, ...]]:
    r, samples = make(3, dtype, requires_grad), []
    for tokens, transposed, biased, name in (
        (5, True, False, "silu"),
        (0, True, True, "swigluoai"),
        (3, False, True, "swigluoai"),
    ):
        ids = torch.randint(lowest_id, 3, (tokens, 2), generator=torch.Generator().manual_seed(tokens))
        weights = (r(3, 6, 4), r(3, 4, 3)) if transposed else (r(3, 4, 6), r(3, 3, 4))
        arguments = RoutedExpertsArguments(
            x=r(tokens, 4),
            expert_ids=ids,
            expert_weights=torch.rand(tokens, 2).requires_grad_(requires_grad),
            gate_up=weights[0],
            down=weights[1],
            gate_up_bias=r(3, 6) if biased else None,
            down_bias=r(3, 4) if biased else None,
            quant_weights=None,
            adapter_ids=None,
            lora=None,
            intermediate_size=3,
            transposed=transposed,
            interleaved=biased,
            quant="",
            invariant=biased,
            activation=PRESETS[name],
        )
        samples.append(arguments)
    if codes:
        quant = QuantConfig(scheme="int8", granularity="channel").json
        weights = torch.arange(72, dtype=torch.int8).view(3, 6, 4), torch.arange(36, dtype=torch.int8).view(3, 4, 3)
        scales = QuantWeights(gate_up_scale=torch.rand(3, 6, 1) / 100, down_scale=torch.rand(3, 4, 1) / 100)
        samples.append(samples[0]._replace(gate_up=weights[0], down=weights[1], quant_weights=scales, quant=quant))
    if adapters:
        of_gate_up = {"gate_up_a": r(2, 3, 1, 4), "gate_up_b": r(2, 3, 6, 1)}
        lora = LoRAWeights(**of_gate_up, down_a=r(2, 3, 1, 3), down_b=r(2, 1, 4, 1))
        samples.append(samples[0]._replace(adapter_ids=torch.tensor([1, 0, -1, 1, 2]), lora=lora))
    return [(*flat(arguments), requires_grad) for arguments in samples]


def routed_experts_backward(dtype: torch.dtype, requires_grad: bool, adapters: bool = False) -> list[tuple[Any, ...]]:
    samples = []
    for x, *rest, _ in routed_experts(dtype, requires_grad, adapters=adapters):
        given = dict(zip(ARGUMENTS, (x, *rest), strict=True))
        needed = [given[name] is not None for name in DIFFERENTIABLE]
        samples.append((torch.ones_like(x).requires_grad_(requires_grad), needed, x.new_empty(0), x, *rest))
    return samples


def quantized_matmul(dtype: torch.dtype, requires_grad: bool) -> list[tuple[Any, ...]]:
    r, samples = make(4, dtype, requires_grad), []
    for scheme, per_byte, zero in (("int8", 1, False), ("int4", 2, True)):
        quant = QuantConfig(scheme=scheme, granularity="group", group_size=2, zero_points=zero)  # type: ignore[arg-type]
        codes = torch.randint(0, 127, (3, 6, 4 // per_byte), dtype=torch.uint8).to(torch.uint8 if zero else torch.int8)
        scale, zeros = torch.rand(3, 6, 2), torch.randint(0, 15, (3, 6, 2), dtype=torch.uint8) if zero else None
        for transposed, width in ((True, 4), (False, 6)):
            samples.append(
                (r(7, width), codes, scale, zeros, None, ends(2, 2, 6), quant.json, 2, transposed, 1, 1, zero)
            )
    return samples


def elementwise(dtype: torch.dtype, requires_grad: bool) -> list[tuple[Any, ...]]:
    r = make(5, dtype, requires_grad)
    return [
        (r(*shape), name)
        for shape, name in (((3, 5), "exp"), ((0,), "sigmoid"), ((1,), "softplus"), ((40,), "tanh"), ((2, 1), "erf"))
    ]


def route_top_k(dtype: torch.dtype, requires_grad: bool) -> list[tuple[Any, ...]]:
    r, config = make(2, dtype, requires_grad), Case("deepseek").config
    biased, plain = config.json, dataclasses.replace(config, router=RouterConfig()).json
    return [(r(5, 8), torch.randn(8), biased), (r(3, 8), None, plain), (r(0, 8), None, plain)]


def gather_rows(dtype: torch.dtype, requires_grad: bool) -> list[tuple[Any, ...]]:
    r, samples = make(2, dtype, requires_grad), []
    for tokens, repeat in ((3, 2), (5, 1), (0, 2)):
        order = torch.randperm(tokens * repeat, generator=torch.Generator().manual_seed(tokens))
        samples.append((r(tokens, 4), order, order.argsort(), repeat))
    return samples


def whole_layer(dtype: torch.dtype, requires_grad: bool) -> list[tuple[Any, ...]]:
    samples = []
    for case, tokens in (
        (Case("default", "opaque"), 5),
        (Case("everything", "opaque_chunked"), 20),
        (Case("deepseek", "opaque"), 0),
    ):
        weights, x, logits, mask = case.args(tokens, dtype)
        gate_x = x + 0.125 if logits is None else None  # under autocast: another dtype than x
        tensors = [x, logits, None, mask, None, None, None, None, gate_x, *leaves_of_weights(weights)]
        samples.append((case.config.json, *(_leaf(t, requires_grad) for t in tensors)))
    return samples


def _leaf(t: Tensor | None, requires_grad: bool) -> Tensor | None:
    return t if t is None or not t.is_floating_point() else t.detach().clone().requires_grad_(requires_grad)


def moe_backward(dtype: torch.dtype, requires_grad: bool) -> list[tuple[Any, ...]]:
    samples = []
    for with_shared in (False, True):
        for config, x, *rest in whole_layer(dtype, False):  # it has no derivative
            needed = [t is not None and t.is_floating_point() for t in (x, *rest)]
            gradient = torch.ones_like(x)
            samples.append((gradient if with_shared else None, gradient, needed, config, x, *rest))
    return samples


SAMPLES: dict[str, Callable[[torch.dtype, bool], list[tuple[Any, ...]]]] = {
    "moe_fn::grouped_matmul": grouped_matmul,
    "moe_fn::grouped_outer": grouped_outer,
    "moe_fn::grouped_matmul_native": grouped_matmul,
    "moe_fn::grouped_outer_native": grouped_outer,
    "moe_fn::routed_experts_native": partial(routed_experts, adapters=True),
    "moe_fn::routed_experts_backward_native": partial(routed_experts_backward, adapters=True),
    "moe_fn::grouped_matmul_triton": grouped_matmul,
    "moe_fn::grouped_outer_triton": grouped_outer,
    "moe_fn::routed_experts_triton": partial(
        routed_experts, lowest_id=0, codes=True
    ),  # rows of no expert are not written in the saved pre-activations
    "moe_fn::routed_experts_backward_triton": routed_experts_backward,
    "moe_fn::route_top_k_native": route_top_k,
    "moe_fn::route_top_k_triton": route_top_k,
    "moe_fn::quantized_matmul": quantized_matmul,
    "moe_fn::quantized_matmul_native": quantized_matmul,
    "moe_fn::quantized_matmul_triton": quantized_matmul,
    "moe_fn::elementwise": elementwise,
    "moe_fn::gather_rows": gather_rows,
    "moe_fn::moe_forward": whole_layer,
    "moe_fn::moe_forward_shared": whole_layer,
    "moe_fn::moe_backward": moe_backward,
}


def refuses(name: str, dtype: torch.dtype) -> str | None:
    """Returns the reason why an op does not run here for a dtype, or None."""
    if name.endswith("_native"):
        return native.problem("cpu", dtype)
    if name.endswith("_triton"):
        return gpu.problem("cpu", dtype) or (
            "Triton's interpreter multiplies bfloat16 as integers" if dtype == torch.bfloat16 else None
        )
    return None


# They need other ranks: `test_parallel` compares their fakes, gradients and graphs with eager mode in processes.
COLLECTIVES = {
    f"moe_fn::{name}"
    for name in (
        "wait", "sum_over_ranks", "copy_to_ranks", "gather_ranks", "scatter_ranks", "own_rows", "join_rows",
        "exchange_ranks",
        "exchange_splits", "as_gathered", "as_exchanged", "as_split",
    )
}  # fmt: skip


def test_every_op_has_samples() -> None:
    assert set(OPS) == set(SAMPLES) | COLLECTIVES, "add samples here for each new op"


# The parts of opcheck that run an op once: its schema is correct, and its fake has the sizes, dtype and strides of the
# result, which a dtype or a sample can change. Tracing takes 0.2 to 2 s a sample; it and the registration of gradients
# depend on the op.
QUICK = ("test_schema", "test_faketensor")
SLOW = ("test_autograd_registration", "test_aot_dispatch_dynamic")
# Triton's interpreter takes 20 s for each dtype, and the contract is the same.
IN_DTYPES = [
    (name, dtype) for dtype in DTYPES for name in SAMPLES if not name.endswith("_triton") or dtype == torch.float32
]
in_dtypes = pytest.mark.parametrize(
    ("name", "dtype"), [pytest.param(name, dtype, id=f"{name}-{dtype}") for name, dtype in IN_DTYPES]
)
# Samples with other traces than the first one: both layouts of weights, with bias and saved pre-activations, a missing
# tensor, more than one segment.
TRACED = {
    "moe_fn::grouped_matmul": (0, 3), "moe_fn::grouped_outer": (0, 2), "moe_fn::routed_experts_native": (0, 2),
    "moe_fn::routed_experts_backward_native": (0, 2), "moe_fn::moe_forward": (0, 1), "moe_fn::moe_backward": (1, 3),
    "moe_fn::route_top_k_native": (0, 1), "moe_fn::route_top_k_triton": (0, 1), "moe_fn::quantized_matmul": (0, 3),
}  # fmt: skip


@in_dtypes
def test_schemas_and_fakes_are_right(name: str, dtype: torch.dtype) -> None:
    if reason := refuses(name, dtype):
        pytest.skip(reason)
    for sample in SAMPLES[name](dtype, True):
        opcheck(op_of(name), sample, test_utils=QUICK)


@pytest.mark.parametrize("name", SAMPLES)
def test_ops_are_traced_with_their_gradients(name: str) -> None:
    if reason := refuses(name, torch.float32):
        pytest.skip(reason)
    samples = SAMPLES[name](torch.float32, True)
    for number in TRACED.get(name, (0,)):
        opcheck(op_of(name), samples[number], test_utils=SLOW)


@pytest.mark.thorough
@in_dtypes
def test_opcheck_passes(name: str, dtype: torch.dtype) -> None:
    if reason := refuses(name, dtype):
        pytest.skip(reason)
    for sample in SAMPLES[name](dtype, True):
        opcheck(op_of(name), sample)


@pytest.mark.parametrize("name", SAMPLES)
def test_ops_are_traced_where_nothing_requires_a_gradient(name: str) -> None:
    if not name.endswith("_triton"):  # their fakes and traces are those of the native ops
        opcheck(op_of(name), SAMPLES[name](torch.float32, False)[0], test_utils=SLOW)


@pytest.mark.thorough
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_passes_where_nothing_requires_a_gradient(name: str) -> None:
    for sample in SAMPLES[name](torch.float32, False):
        opcheck(op_of(name), sample)


@pytest.mark.parametrize("name", OPS)
def test_ops_mutate_nothing_and_alias_nothing(name: str) -> None:
    schema = op_of(name)._schema
    assert not schema.is_mutable
    assert all(argument.alias_info is None for argument in (*schema.arguments, *schema.returns))


@pytest.mark.parametrize("name", SAMPLES)
def test_ops_leave_their_inputs_as_they_are(name: str) -> None:
    for sample in SAMPLES[name](torch.float32, False):
        before = [t.clone() if isinstance(t, Tensor) else t for t in sample]
        op_of(name)(*sample)
        for old, new in zip(before, sample, strict=True):
            assert torch.equal(old, new) if isinstance(old, Tensor) else old is new


@pytest.mark.parametrize("name", OPS)
def test_schemas_have_no_defaults_which_the_dispatcher_would_drop(name: str) -> None:
    assert not any(argument.has_default_value() for argument in op_of(name)._schema.arguments)


@pytest.mark.parametrize("name", OPS)
def test_ops_say_why_they_exist_and_what_would_remove_them(name: str) -> None:
    op, short = op_of(name), name.removeprefix("moe_fn::")
    homes = [module for module in _modules() if any(value is op for value in vars(module).values())]
    assert homes, f"{name} is not an attribute of a module"
    documented = [*homes, *(vars(home)[short] for home in homes if short in vars(home))]
    words = " ".join(inspect.getdoc(thing) or "" for thing in documented).lower()
    assert any(why in words for why in WHY), f"{name}: expected one of {WHY} in its docstring or its module's"


def _modules() -> list[Any]:
    return [module for name, module in sys.modules.items() if name.startswith("moe_fn.") and module is not None]


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        pytest.param(name, samples, id=f"{name}-{'first' if samples == 1 else 'all'}", marks=marks)
        for name in SAMPLES
        for samples, marks in ((1, ()), (9, pytest.mark.thorough))
    ],
)
def test_ops_agree_between_eager_and_compiled(name: str, samples: int) -> None:
    op = op_of(name)
    for sample in SAMPLES[name](torch.float32, False)[:samples]:
        expected = op(*sample)
        actual = torch.compile(lambda *args: op(*args), backend="aot_eager", fullgraph=True)(*sample)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        torch._dynamo.reset()


def test_no_op_warns_that_its_derivative_is_missing() -> None:
    """torch warns "an autograd kernel was not registered" where a gradient would be silently zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("moe_fn::grouped_matmul", "moe_fn::grouped_outer", "moe_fn::gather_rows", "moe_fn::moe_forward"):
            for sample in SAMPLES[name](torch.float32, True):
                op_of(name)(*sample).sum().backward()
