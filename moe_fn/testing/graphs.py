"""Checks that a function compiles to one graph for every number of tokens, with the results of eager mode."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from moe_fn.testing.graph_nodes import inspecting_backend
from moe_fn.testing.matching import TOLERANCES, Tolerance, assert_matches
from moe_fn.torch_compat import mark_tokens

Backend = Literal["inductor", "aot_eager", "eager"]
Args = tuple[Any, ...]

# Compiled code keeps float32 between operations where eager rounds each, and sums in another order.
_COMPILED_TOLERANCES = {dtype: 4 * tolerance for dtype, tolerance in TOLERANCES.items()}


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of graphs and graph breaks of torch.compile, and the reasons of the breaks."""

    graphs: int
    breaks: int
    break_reasons: tuple[str, ...] = ()


def count_graphs(
    fn: Callable[..., Any],
    calls: Iterable[Args],
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    backend: Backend = "eager",
) -> Counts:
    """Compiles fn, calls it with each tuple of arguments, and counts graphs and breaks. Resets torch._dynamo first.

    Sizes of arguments are not marked as dynamic.

    >>> def with_print(x):
    ...     print("!")
    ...     return x + 1
    >>> counts = count_graphs(with_print, [(torch.ones(2),)])
    !
    >>> counts.breaks
    1
    """
    counter = _reset(inspecting_backend(backend, (), []))
    compiled = torch.compile(fn, backend=counter, fullgraph=fullgraph, dynamic=dynamic)
    for args in calls:
        compiled(*args)
    return _counts(counter)


def assert_one_graph(
    fn: Callable[..., Any],
    make_args: Callable[[int], Args],
    tokens: Sequence[int] = (3, 0, 1, 2, 7, 64, 65),
    *,
    fullgraph: bool = True,
    backward: bool = False,
    backend: Backend = "inductor",
    forbid: Sequence[str] = (),
    tolerance: Tolerance = None,
    scale: float = 0.0,
) -> None:
    """Raises AssertionError unless fn compiles to one graph that matches eager mode for every number of tokens.

    fn(*make_args(n)) is compiled once and run at each n of `tokens`. Arguments are pytrees; tensors whose first size is
    n at every n have it marked (`moe_fn.torch_compat.mark_tokens`). Checks Dynamo's graph and, except for backend
    "eager", AOTAutograd's:

        exactly one graph; no graph break; no recompilation; no node whose size depends on values (nonzero, item,
        boolean mask, bincount, unique, ...), even if fullgraph allows it; results, and with `backward` gradients, equal
        those of eager mode

    fullgraph  False compiles like a plain torch.compile(model), which captures less: test both
    backward   also compare gradients of every tensor that requires one, or of all floating tensors if none does
    forbid     prefixes of operator names that must not occur, such as "aten.index_add"
    tolerance, scale   as in `assert_matches`; None: four times TOLERANCES

    Resets torch._dynamo before and after.

    >>> assert_one_graph(lambda x, w: x @ w, lambda n: (torch.ones(n, 3), torch.ones(3, 2)), backward=True,
    ...     backend="aot_eager")
    >>> assert_one_graph(lambda x: x[x > 0], lambda n: (torch.ones(n),), backend="aot_eager")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: <lambda>: Dynamo's graph: getitem depends on data; Dynamo's graph: getitem makes the data-dependent size u1; ...
    """  # noqa: E501
    name = getattr(fn, "__qualname__", type(fn).__name__).split(".")[-1]
    found: list[str] = []
    calls = {count: make_args(count) for count in tokens}
    places = _token_places(make_args, calls)
    counter = _reset(inspecting_backend(backend, forbid, found))
    compiled = torch.compile(fn, backend=counter, fullgraph=fullgraph)
    with ExitStack() as stack:
        stack.callback(torch._dynamo.reset)
        stack.enter_context(torch._dynamo.config.patch(error_on_recompile=True))
        # A hit in this cache would skip the inspected compilation.
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        for count, args in calls.items():
            at = f"{name} at {count} tokens"
            expected = _run(fn, _copy(args, (), backward), backward)
            try:
                actual = _run(compiled, _copy(args, places, backward), backward)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                raise AssertionError(f"{at}: {_summary(error)}{_also(counter, found)}") from error
            table = _COMPILED_TOLERANCES if tolerance is None else tolerance
            _assert_same_results(at, actual, expected, table, scale)
        _assert_clean(name, _counts(counter), found)


def _reset(backend: Callable[..., Any]) -> CompileCounterWithBackend:
    torch._dynamo.reset()
    counters.clear()
    return CompileCounterWithBackend(backend)  # type: ignore[arg-type]


def _counts(counter: CompileCounterWithBackend) -> Counts:
    reasons = counters["graph_break"]
    return Counts(graphs=int(counter.frame_count), breaks=sum(reasons.values()), break_reasons=tuple(map(str, reasons)))


def _assert_clean(name: str, counts: Counts, found: list[str]) -> None:
    if counts.breaks:
        raise AssertionError(
            f"{name}: {counts.breaks} graph breaks: {'; '.join(_shorten(reason) for reason in counts.break_reasons)}"
        )
    if found:
        raise AssertionError(f"{name}: {'; '.join(dict.fromkeys(found))}")
    if counts.graphs != 1:
        raise AssertionError(
            f"{name}: {counts.graphs} graphs, expected exactly 1; with fullgraph=True the error may say where it broke"
        )


def _assert_same_results(at: str, actual: Args, expected: Args, tolerance: Tolerance, scale: float) -> None:
    try:
        assert_matches(actual[0], expected[0], tolerance=tolerance, scale=scale, name=f"{at}, result")
        for index, (got, wanted) in enumerate(zip(actual[1], expected[1], strict=True)):
            assert_matches(
                got, wanted, tolerance=tolerance, scale=scale, name=f"{at}, gradient of differentiable argument {index}"
            )
    except AssertionError as error:
        raise AssertionError(f"compiled differs from eager: {error}") from None


def _token_places(make_args: Callable[[int], Args], calls: dict[int, Args]) -> tuple[int, ...]:
    """Indices of the argument leaves whose dim 0 is tokens: its size is n for every n, unlike [3, ...] of 3 experts."""
    if len(calls) == 1:  # one count is ambiguous
        calls = calls | {count + 1: make_args(count + 1) for count in calls}
    leaves = {count: tree_leaves(args) for count, args in calls.items()}
    shortest = min(map(len, leaves.values()))
    return tuple(
        place
        for place in range(shortest)
        if all(
            isinstance(own[place], Tensor) and own[place].ndim > 0 and own[place].shape[0] == count
            for count, own in leaves.items()
        )
    )


def _copy(args: Args, marked: tuple[int, ...], backward: bool) -> Args:
    """A copy of the arguments for one run, as leaves of autograd."""
    leaves, structure = tree_flatten(args)
    asked = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
    copies = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    for place, (leaf, copy) in enumerate(zip(leaves, copies, strict=True)):
        if isinstance(copy, Tensor):
            copy.requires_grad_(leaf.requires_grad or (backward and not asked and copy.is_floating_point()))
        if place in marked:
            mark_tokens(copy)
    return tree_unflatten(copies, structure)  # type: ignore[no-any-return]


def _run(fn: Callable[..., Any], args: Args, backward: bool) -> tuple[Any, list[Tensor]]:
    result = fn(*args)
    if not backward:
        return result, []
    inputs = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.requires_grad]
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not inputs or not outputs:
        raise AssertionError("backward=True, but no result depends on a floating tensor among the arguments")
    # All entries differ, so that a gradient of the wrong row or column is detected.
    seeds = [
        torch.arange(1, o.numel() + 1, device=o.device, dtype=torch.float64).cos().reshape(o.shape).to(o.dtype)
        for o in outputs
    ]
    gradients = torch.autograd.grad(outputs, inputs, seeds, allow_unused=True)
    return result, [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, gradients, strict=True)]


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {_shorten(str(error))}"


def _shorten(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return " | ".join(lines[:8])


def _also(counter: CompileCounterWithBackend, found: list[str]) -> str:
    counts = _counts(counter)
    reasons = [*(_shorten(reason) for reason in counts.break_reasons), *dict.fromkeys(found)]
    return f" ({counts.graphs} graphs, {counts.breaks} breaks{': ' if reasons else ''}{'; '.join(reasons)})"
