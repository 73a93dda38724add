"""Finds data-dependent nodes, and sizes that depend on values, in the graphs of torch.compile."""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

# Names in Dynamo's graph; in the later graphs the tags of aten's operators say the same.
_DATA_DEPENDENT_NAMES = {
    "nonzero", "argwhere", "item", "tolist", "masked_select", "unique", "_unique2", "unique_consecutive", "bincount",
    "is_nonzero", "equal",
    "allclose", "_local_scalar_dense",
}  # fmt: skip
_DATA_DEPENDENT_TAGS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def bad_nodes(gm: fx.GraphModule, where: str, forbid: Sequence[str] = ()) -> list[str]:
    """One line for every node whose work or size depends on values, or whose target starts with a name in `forbid`;
    subgraphs included.

    >>> bad_nodes(fx.symbolic_trace(lambda x: x.nonzero()), "a graph")
    ['a graph: nonzero depends on data']
    """
    found = []
    for name, module in gm.named_modules():
        if isinstance(module, fx.GraphModule):
            place = f"{where}, {name}" if name else where
            # the body of a scan has its own symbols, such as the loop counter
            sizes = _new_sizes(module) if not name else iter(())
            found += [f"{place}: {reason}" for reason in (*_bad_targets(module, forbid), *sizes)]
    return found


def _bad_targets(gm: fx.GraphModule, forbid: Sequence[str]) -> Iterator[str]:
    for node in gm.graph.nodes:
        if not node.op.startswith("call_"):
            continue
        name = _name_of(node)
        if any(name.startswith(prefix) for prefix in forbid):
            yield f"{name} is forbidden"
        elif _depends_on_data(node):
            yield f"{name} depends on data"


def _name_of(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload | str):
        return str(target)
    return getattr(target, "__name__", str(target))


def _depends_on_data(node: fx.Node) -> bool:
    target, name = node.target, _name_of(node).removeprefix("aten.").split(".")[0]
    if name == "repeat_interleave":
        return node.kwargs.get("output_size") is None and not (len(node.args) > 1 and isinstance(node.args[1], int))
    if target in (operator.getitem, torch.ops.aten.index.Tensor):
        return _has_mask(node.args[1])
    if name == "where":
        return len(node.args) + len(node.kwargs) == 1
    if isinstance(target, torch._ops.OpOverload):
        return bool(_DATA_DEPENDENT_TAGS & set(target.tags))
    return name in _DATA_DEPENDENT_NAMES


def _has_mask(index: Any) -> bool:
    """Whether an index is or contains a boolean tensor: then the number of rows depends on its values."""
    if isinstance(index, tuple | list):
        return any(_has_mask(part) for part in index)
    value = _value_of(index) if isinstance(index, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


def _value_of(node: fx.Node) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))


def _new_sizes(gm: fx.GraphModule) -> Iterator[str]:
    """Sizes that are not sizes of the graph's inputs: they are read from values at runtime."""
    known: set[Any] = set()
    for node in gm.graph.nodes:
        symbols = _unbacked_symbols(_value_of(node))
        if node.op != "placeholder" and symbols - known:
            yield f"{_name_of(node)} makes the data-dependent size {', '.join(sorted(map(str, symbols - known)))}"
        known |= symbols


def _unbacked_symbols(value: Any) -> set[Any]:
    if isinstance(value, tuple | list):
        return set().union(*map(_unbacked_symbols, value))
    return (
        set(free_unbacked_symbols(value))
        if isinstance(value, Tensor | torch.SymInt | torch.SymFloat | torch.SymBool)
        else set()
    )


def inspecting_backend(backend: str, forbid: Sequence[str], found: list[str]) -> Callable[..., Any]:
    """A backend of torch.compile that appends to `found` the bad nodes of its graphs: Dynamo's, and AOTAutograd's
    forward and backward.
    """

    def compile_inner(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        found.extend(bad_nodes(gm, "backward graph" if options.get("is_backward") else "forward graph", forbid))
        return compile_fx_inner(gm, inputs, **options)

    def inspecting_compiler(where: str) -> Callable[..., Any]:
        def compile_nothing(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            found.extend(bad_nodes(gm, where, forbid))
            return boxed_nop(gm, inputs)  # type: ignore[arg-type]

        return compile_nothing

    def compile_graph(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        found.extend(bad_nodes(gm, "Dynamo's graph", forbid))
        if backend == "inductor":
            return compile_fx(gm, inputs, inner_compile=compile_inner)
        if backend == "aot_eager":
            forward, backward = inspecting_compiler("forward graph"), inspecting_compiler("backward graph")
            return aot_autograd(fw_compiler=forward, bw_compiler=backward)(gm, inputs)
        return gm.forward

    return compile_graph
