"""The graphs that torch.compile makes of a function: Dynamo's, and AOTAutograd's forward and backward."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

READS_VALUES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


@dataclass
class Graphs:
    """All graphs of one compiled function."""

    dynamo: list[fx.GraphModule] = field(default_factory=list)
    forward: list[fx.GraphModule] = field(default_factory=list)
    backward: list[fx.GraphModule] = field(default_factory=list)

    @property
    def all(self) -> list[fx.GraphModule]:
        return [*self.dynamo, *self.forward, *self.backward]


def graphs_of(
    fn: Callable[..., Any],
    args: Sequence[Any],
    *,
    fullgraph: bool = True,
    interpreter: type[fx.Interpreter] | None = None,
) -> Graphs:
    """Compiles fn, runs it on args and, if an input requires a gradient, backward. Returns the graphs.

    interpreter: runs the graphs, which are then partitioned into forward and backward as by Inductor.
    """
    graphs = Graphs()

    def keep(into: list[fx.GraphModule]) -> Callable[..., Any]:
        def compiler(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            into.append(gm)
            return boxed_nop(gm, inputs) if interpreter is None else make_boxed_func(interpreter(gm).run)  # type: ignore[arg-type]

        return compiler

    cut: dict[str, Any] = {"partition_fn": min_cut_rematerialization_partition} if interpreter else {}
    aot = aot_autograd(fw_compiler=keep(graphs.forward), bw_compiler=keep(graphs.backward), **cut)

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.dynamo.append(gm)
        return aot(gm, inputs)

    with torch._functorch.config.patch(enable_autograd_cache=False):
        result = torch.compile(fn, backend=backend, fullgraph=fullgraph)(*args)
        outputs = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
        if outputs:
            torch.autograd.backward([o.sum() for o in outputs])
    return graphs


def nodes(graphs: fx.GraphModule | Sequence[fx.GraphModule]) -> Iterator[fx.Node]:
    """Yields the nodes of the graphs and of their subgraphs, such as the body of a scan."""
    for gm in [graphs] if isinstance(graphs, fx.GraphModule) else graphs:
        for module in gm.modules():
            if isinstance(module, fx.GraphModule):
                yield from module.graph.nodes


def name_of(node: fx.Node) -> str:
    target = node.target
    return str(target) if isinstance(target, torch._ops.OpOverload | str) else getattr(target, "__name__", str(target))


def ops(graphs: fx.GraphModule | Sequence[fx.GraphModule], prefix: str = "moe_fn.") -> Counter[str]:
    """Counts the operators with this prefix in the graphs: {"grouped_matmul": 2}."""
    names = (name_of(node) for node in nodes(graphs) if node.op == "call_function")
    return Counter(name.removeprefix(prefix).removesuffix(".default") for name in names if name.startswith(prefix))


def reading_values(graphs: fx.GraphModule | Sequence[fx.GraphModule]) -> list[str]:
    """Returns the operators whose host code or output size depends on values of tensors: each is a sync on a GPU."""
    found = []
    for node in nodes(graphs):
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            masks = target is torch.ops.aten.index.Tensor and any(
                i is not None and i.meta["val"].dtype in (torch.bool, torch.uint8) for i in node.args[1]
            )
            if (
                masks
                or READS_VALUES & set(target.tags)
                or target in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
            ):
                found += [name_of(node)] if masks or READS_VALUES & set(target.tags) or _moves(node) else []
        elif node.op == "call_method" and target in ("item", "tolist", "nonzero", "cpu"):
            found.append(str(target))
    return found


def _moves(node: fx.Node) -> bool:
    """Whether a node copies to another device."""
    source, value = next(a for a in reversed(node.args) if isinstance(a, fx.Node)).meta.get("val"), node.meta.get("val")
    return isinstance(source, Tensor) and isinstance(value, Tensor) and source.device != value.device


def new_sizes(gm: fx.GraphModule) -> set[Any]:
    """Returns the symbolic sizes in the graph that no input has."""
    of_inputs, of_all = set(), set()
    for node in gm.graph.nodes:
        value = node.meta.get("val", node.meta.get("example_value"))
        for part in value if isinstance(value, tuple | list) else [value]:
            if isinstance(part, Tensor | torch.SymInt):
                of_all |= set(free_unbacked_symbols(part))
                if node.op == "placeholder":
                    of_inputs |= set(free_unbacked_symbols(part))
    return of_all - of_inputs
