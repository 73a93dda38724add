"""Help with torch.compile: which dimension counts tokens, and what is constant while it traces."""

from collections.abc import Callable
from typing import TypeVar

import torch
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
    """Tell torch.compile that `dim` of these tensors counts tokens, so that one graph serves every count, 0 and 1 included.

    Call it outside the compiled function, on its arguments, before each call; None stands for an argument that is not there.

    Without it torch.compile makes up to four graphs: one for the first count, one for "any count from 2 on", one for 1, one for 0.
    It wraps `torch._dynamo.decorators.mark_unbacked`: the size becomes a number that the tracer may not look at, so no guard on
    it can exist and nothing recompiles. Code that branches on the size, in Python, then fails to trace rather than recompile.
    The mark is an attribute of the tensor object; it changes no value, and views and copies do not inherit it.

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
    """ValueError(words) where two sizes differ, while tracing too; sizes that a graph learns when it runs are compared then.

    torch._check could say the words there, but from a lambda, and a graph that holds one cannot be pickled into AOTAutograd's cache.
    """
    if not guard_or_true(size == expected):
        raise ValueError(words)
    torch._check(size == expected)


@constant_while_tracing
def autocast_around_graph(device: str) -> bool:
    """While tracing: whether autocast is on around the compiled function, so that AOTAutograd traces its backward under it too."""
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
    """Whether tangents may be about. A constant while tracing: torch.compile guards the level of forward mode by itself."""
    return forward_ad._current_level >= 0


def check_draft_export(op: str) -> None:
    """ValueError where torch.export.draft_export traces an op with optional tensors: one that is None, it says, was written to."""
    if torch.compiler.is_compiling() and _in_draft_export():
        raise ValueError(
            f"moe_fn::{op}: torch.export.draft_export (torch 2.13) takes its optional tensors that are None for ones that it writes to; "
            "expected torch.export.export, or MoEConfig(backend='torch', opaque=False, quant=None)"
        )


@constant_while_tracing
def _in_draft_export() -> bool:
    from torch._functorch import config  # there already, where anything is traced

    return bool(config.fake_tensor_propagate_real_tensors)
