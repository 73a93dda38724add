"""Private torch APIs, and APIs that differ between torch versions: graph constants, process groups, traced sizes.

Only this module and ops/define use private names of torch.
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
    """Marks a function that torch.compile calls while it traces, and whose result becomes a constant of the graph.

    Same as torch.compiler.assume_constant_result, without importing the compiler, which takes 1.7 s.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def mark_tokens(*tensors: Tensor | None, dim: int = 0) -> None:
    """Marks `dim` of these tensors as a number of tokens, so that one compiled graph serves every number, 0 and 1
    included.

    Call it outside of the compiled function, on its arguments, before each call; None arguments are skipped.

    Without it torch.compile makes up to four graphs: for the first number of tokens, for any number >= 2, for 1 and for
    0. It wraps `torch._dynamo.decorators.mark_unbacked`: the size becomes unbacked, so there are no guards on it and no
    recompiles. Python code that branches on the size then fails to trace instead of recompiling. The mark is an
    attribute of the tensor object; it changes no value, and views and copies do not inherit it.

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
    from torch._dynamo.decorators import mark_unbacked  # imported here: it takes a second

    for tensor in tensors:
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or not -tensor.ndim <= dim < tensor.ndim:
            came = f"one of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
            raise ValueError(f"mark_tokens: expected tensors (or None) that have a dim {dim}, got {came}")
        mark_unbacked(tensor, dim % tensor.ndim)


def check_same_size(size: int, expected: int, message: str) -> None:
    """Raises ValueError(message) where two sizes differ, while tracing too. Unbacked sizes are compared when the graph
    runs.

    torch._check takes a message only as a lambda, and a graph that holds a lambda cannot be pickled into AOTAutograd's
    cache.
    """
    if not guard_or_true(size == expected):
        raise ValueError(message)
    torch._check(size == expected)


@constant_while_tracing
def autocast_around_graph(device: str) -> bool:
    """While tracing: whether autocast is on around the compiled function. AOTAutograd then traces the backward under
    autocast too.
    """
    context = torch._guards.TracingContext.try_get()
    state = {} if context is None else context.global_context.global_state
    return bool(state.get("autocast_cpu_enabled" if device == "cpu" else "autocast_enabled", (None, False))[1])


@constant_while_tracing
def traces_switching_autocast() -> bool:
    """Whether Dynamo can trace torch.set_autocast_enabled; it cannot in torch 2.11."""
    from torch._dynamo.trace_rules import lookup
    from torch._dynamo.variables.functions import SkipFunctionVariable

    return lookup(torch.set_autocast_enabled) is not SkipFunctionVariable


@constant_while_tracing
def exporting() -> bool:
    """torch.compiler.is_exporting(), called while tracing: Dynamo of torch 2.11 replaces the call itself by True."""
    return torch.compiler.is_exporting()


@constant_while_tracing
def in_forward_mode() -> bool:
    """Whether forward-mode AD is active, so that inputs may have tangents.

    A constant while tracing: torch.compile guards on the level of forward-mode AD.
    """
    return forward_ad._current_level >= 0


def check_draft_export(op: str) -> None:
    """Raises ValueError where torch.export.draft_export traces an op with optional tensors: draft_export reports those
    that are None as mutated.
    """
    if torch.compiler.is_compiling() and _in_draft_export():
        raise ValueError(
            f"moe_fn::{op}: torch.export.draft_export (torch 2.13) takes optional tensors that are None for mutated "
            "ones; expected torch.export.export, or MoEConfig(backend='torch', opaque=False, quant=None)"
        )


@constant_while_tracing
def _in_draft_export() -> bool:
    from torch._functorch import config  # imported already whenever something is traced

    return bool(config.fake_tensor_propagate_real_tensors)


@constant_while_tracing
def scalars_allowed() -> bool:
    """Whether Python may read numbers from tensors here: in eager, under fullgraph=True, or with
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
    """Whether a transform of torch.func is active: vmap, grad, vjp, jvp or functionalize."""
    return bool(torch._C._are_functorch_transforms_active())


def scan(step: Callable[..., Any], carry: Any, xs: Any) -> Any:
    """torch's scan, a loop in the graph. Imported here because it imports the compiler."""
    from torch._higher_order_ops.scan import scan as loop

    return loop(step, carry, xs)


def fake_mode_of(values: Any) -> Any:
    """Returns the FakeTensorMode of the values, or a new one; fake tensors have shapes and no values."""
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensorMode

    return detect_fake_mode(values) or FakeTensorMode()


def data_dependent_error() -> type[Exception]:
    """Returns the exception type that reading a value of a fake tensor raises."""
    from torch._subclasses.fake_tensor import DataDependentOutputException

    return DataDependentOutputException


def default_group() -> Any:
    """Returns the process group of all ranks."""
    c10d: Any = dist.distributed_c10d
    return c10d._get_default_group()


def group_of_name(name: str) -> Any:
    """Returns the process group with this name. Raises RuntimeError, ValueError or KeyError if there is none."""
    c10d: Any = dist.distributed_c10d
    return c10d._resolve_process_group(name)


def default_store(prefix: str) -> Any:
    """Returns the store that torch.distributed was initialized with, for keys below a prefix."""
    c10d: Any = dist.distributed_c10d
    return c10d.PrefixStore(prefix, c10d._get_default_store())


def is_wrapper(value: Any) -> bool:
    """Whether the value is a wrapper subclass, a tensor that holds other tensors, as DTensor is."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return bool(is_traceable_wrapper_subclass(value))


def is_fake(tensor: Tensor) -> bool:
    """Whether the tensor is a FakeTensor. Compares the module name, because importing the class takes a second."""
    return type(tensor).__module__.startswith("torch._subclasses")


def cpu_has(instructions: str) -> bool:
    """Whether this CPU has "avx512" or "avx2"."""
    return bool({"avx512": torch.cpu._is_avx512_supported, "avx2": torch.cpu._is_avx2_supported}[instructions]())


def may_use_tiles() -> bool:
    """Whether this CPU has AMX tiles for bfloat16 and int8, and the system lets this process use them.

    On Linux a process asks the system once; its answer holds for all threads, also those that run already, and for
    forked processes. It may refuse: in some sandboxes, or if a thread's stack for signals is too small for tiles.
    """
    has = torch.cpu.get_capabilities()
    return all(has.get(f"amx_{name}") for name in ("tile", "bf16", "int8")) and bool(torch.cpu._init_amx())
