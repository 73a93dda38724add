"""What torch says in private names, or says otherwise from version to version: all of it stands here and in
ops/define.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import guard_or_true

Function = TypeVar("Function", bound=Callable[..., object])


def constant_while_tracing(function: Function) -> Function:
    """torch.compile calls the function while it traces, and takes its result for a constant.

    It is torch.compiler.assume_constant_result without importing the compiler, which takes 1.7 s.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def mark_tokens(*tensors: Tensor | None, dim: int = 0) -> None:
    """Tell torch.compile that `dim` of these tensors counts tokens, so that one graph serves every count, 0 and 1
    included.

    Call it outside the compiled function, on its arguments, before each call; None stands for an argument that is not
    there.

    Without it torch.compile makes up to four graphs: one for the first count, one for "any count from 2 on", one for 1,
    one for 0. It wraps `torch._dynamo.decorators.mark_unbacked`: the size becomes a number that the tracer may not look
    at, so no guard on it can exist and nothing recompiles. Code that branches on the size, in Python, then fails to
    trace rather than recompile. The mark is an attribute of the tensor object; it changes no value, and views and
    copies do not inherit it.

    >>> import torch
    >>> double = torch.compile(lambda x: x * 2, backend="eager", fullgraph=True)
    >>> for tokens in (5, 0, 1):
    ...     x = torch.ones(tokens, 2)
    ...     mark_tokens(x, None)
    ...     print(tuple(double(x).shape))
    (5, 2)
    (0, 2)
    (1, 2)
    """
    from torch._dynamo.decorators import mark_unbacked  # here, for it takes a second to import

    for tensor in tensors:
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or not -tensor.ndim <= dim < tensor.ndim:
            came = f"one of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
            raise ValueError(f"mark_tokens: expected tensors (or None) that have a dim {dim}, got {came}")
        mark_unbacked(tensor, dim % tensor.ndim)


def check_same_size(size: int, expected: int, words: str) -> None:
    """ValueError(words) where two sizes differ, while tracing too; sizes that a graph learns when it runs are compared
    then.

    torch._check could say the words there, but from a lambda, and a graph that holds one cannot be pickled into
    AOTAutograd's cache.
    """
    if not guard_or_true(size == expected):
        raise ValueError(words)
    torch._check(size == expected)


@constant_while_tracing
def autocast_around_graph(device: str) -> bool:
    """While tracing: whether autocast is on around the compiled function, so that AOTAutograd traces its backward under
    it too.
    """
    context = torch._guards.TracingContext.try_get()
    state = {} if context is None else context.global_context.global_state
    return bool(state.get("autocast_cpu_enabled" if device == "cpu" else "autocast_enabled", (None, False))[1])


@constant_while_tracing
def traces_switching_autocast() -> bool:
    """Whether Dynamo traces torch.set_autocast_enabled, which it does not in torch 2.11."""
    from torch._dynamo.trace_rules import lookup
    from torch._dynamo.variables.functions import SkipFunctionVariable

    return lookup(torch.set_autocast_enabled) is not SkipFunctionVariable


@constant_while_tracing
def exporting() -> bool:
    """torch.compiler.is_exporting(), which in torch 2.11 is true of everything that Dynamo traces."""
    return torch.compiler.is_exporting()


@constant_while_tracing
def in_forward_mode() -> bool:
    """Whether tangents may be about.

    A constant while tracing: torch.compile guards the level of forward mode by itself.
    """
    return forward_ad._current_level >= 0


def check_draft_export(op: str) -> None:
    """ValueError where torch.export.draft_export traces an op with optional tensors: one that is None, it says, was
    written to.
    """
    if torch.compiler.is_compiling() and _in_draft_export():
        raise ValueError(
            f"moe_fn::{op}: torch.export.draft_export (torch 2.13) takes its optional tensors that are None for ones "
            "that it writes to; "
            "expected torch.export.export, or MoEConfig(backend='torch', opaque=False, quant=None)"
        )


@constant_while_tracing
def _in_draft_export() -> bool:
    from torch._functorch import config  # there already, where anything is traced

    return bool(config.fake_tensor_propagate_real_tensors)


@constant_while_tracing
def scalars_allowed() -> bool:
    """Whether numbers may be read from tensors here: in eager, under fullgraph, with
    torch._dynamo.config.capture_scalar_outputs.
    """
    context = torch._guards.TracingContext.try_get()
    return (
        context is None
        or context.fake_mode is None
        or context.fake_mode.shape_env is None
        or context.fake_mode.shape_env.allow_scalar_outputs
    )


def transforms_active() -> bool:
    """Whether the call is below a transform of torch.func: vmap, grad, vjp, jvp or functionalize."""
    return bool(torch._C._are_functorch_transforms_active())


def scan(step: Callable[..., Any], carry: Any, xs: Any) -> Any:
    """torch's scan, a loop in the graph; imported here, for it brings the compiler along."""
    from torch._higher_order_ops.scan import scan as loop

    return loop(step, carry, xs)


def fake_mode_of(values: Any) -> Any:
    """The mode of fake tensors that are among the values, or a new one: below it tensors have shapes and no values."""
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensorMode

    return detect_fake_mode(values) or FakeTensorMode()


def data_dependent_error() -> type[Exception]:
    """What reading a value of a fake tensor raises."""
    from torch._subclasses.fake_tensor import DataDependentOutputException

    return DataDependentOutputException


def default_group() -> Any:
    """The process group of all ranks."""
    c10d: Any = dist.distributed_c10d
    return c10d._get_default_group()


def group_of_name(name: str) -> Any:
    """The process group of a name. Raises RuntimeError, ValueError or KeyError where there is none."""
    c10d: Any = dist.distributed_c10d
    return c10d._resolve_process_group(name)


def default_store(prefix: str) -> Any:
    """The store that torch.distributed was initialised with, for keys below a prefix."""
    c10d: Any = dist.distributed_c10d
    return c10d.PrefixStore(prefix, c10d._get_default_store())


def is_wrapper(value: Any) -> bool:
    """Whether it is a tensor that holds other tensors, as DTensor does."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return bool(is_traceable_wrapper_subclass(value))


def is_fake(tensor: Tensor) -> bool:
    """Whether it is a tensor of a compiler's, without values; by name, for importing the class takes a second."""
    return type(tensor).__module__.startswith("torch._subclasses")


def cpu_has(instructions: str) -> bool:
    """Whether this CPU has "avx512" or "avx2"."""
    return bool({"avx512": torch.cpu._is_avx512_supported, "avx2": torch.cpu._is_avx2_supported}[instructions]())
