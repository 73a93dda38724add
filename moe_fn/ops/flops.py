"""Floating-point operations of the ops, in the convention of torch.utils.flop_counter: 2 * M * K * N for a product [M,
K] by [K, N], nothing for other operations.

    grouped_matmul, quantized_matmul     2 * rows * K * N
    grouped_outer                        2 * rows * M * N
    routed_experts                       2 * slots * H * (C + I),  C = 2 * I, or I where the activation is not gated;
                                         2 * slots * (2 * H + C + I) * rank for adapters
    routed_experts_backward              2 * slots * H * I, the gradient of the activation's output; and if needed
                                         2 * slots * H * C for x, the same for gate_up, 2 * slots * H * I for down;
                                         2 * slots * H * C where the first product was not saved; of adapters
                                         products with A again, those back through B and A, and gradients of A and B
    moe_forward, moe_backward            sum over the products inside

`rows` and `slots` count those with an expert, which are read from the values of ids: on a GPU this is a host sync.
For tensors without values (fake, meta) and for the last two ops all of them count; where the last two ops need the
values to know how many rows come from other ranks, the result is 0. Decoding of quantized weights counts nothing;
adapters are grouped products with their rank as an inner size; biases expanded to rows are products with K = 1.

FlopCounterMode, Inductor and the partitioner read the formulas from a table in torch.utils.flop_counter. That module
imports Triton, which takes time and fixes for the whole process whether Triton interprets its kernels, so moe_fn does
not import it: the formulas are added at once if it is imported already, else when it is imported.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from moe_fn.torch_compat import data_dependent_error, fake_mode_of

Formula = Callable[..., int]
_TABLE = "torch.utils.flop_counter"
_formulas: dict[Any, Formula] = {}  # filled where ops are defined, like torch.library


def register_flops(packet: Any, formula: Formula) -> None:
    """Registers formula(*arguments, out_val=result) -> operations for an op; packet is torch.ops.moe_fn.<name>."""
    if not _formulas:
        sys.meta_path.insert(0, _FinderOfTable())
    _formulas[packet] = formula
    if sys.modules.get(_TABLE) is not None:
        _add_formulas(importlib.import_module(_TABLE))  # waits if another thread is importing it


def _add_formulas(table: Any) -> None:
    for packet, formula in list(_formulas.items()):  # a copy: another thread may be importing moe_fn
        if packet not in table.flop_registry:
            table.register_flop_formula(packet, get_raw=True)(formula)


class _FinderOfTable(MetaPathFinder):
    """Finds the table's module through the finders after this one, and wraps its loader to add the formulas; finds no
    other module.

    It is never removed: removal would make an import in another thread skip a finder, and a reloaded table needs the
    formulas again.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find_spec is None else find_spec(fullname, path, target)
            if spec is not None:
                spec.loader = None if spec.loader is None else _LoaderOfTable(spec.loader)
                return spec
        return None


class _LoaderOfTable(Loader):
    """Wraps a loader to add the formulas after loading.

    The module's loader is the wrapped one again once it is loaded, since that one may load other modules too.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:  # get_source, get_code, get_data, ...
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None and module.__spec__.loader is self:
            module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _add_formulas(module)


def rows_with_expert(ends: Tensor, rows: int, segments: int) -> int:
    """The number of rows before the last end of their segment.

    >>> rows_with_expert(torch.tensor([1, 2, 4, 5]), 6, 2)
    4
    """
    if not _has_values(ends):
        return rows
    starts = torch.arange(segments, device=ends.device) * (rows // segments)
    return int((ends.view(segments, -1)[:, -1] - starts).sum())


def slots_with_expert(expert_ids: Tensor, num_experts: int) -> int:
    """The number of ids in 0 .. num_experts - 1.

    >>> slots_with_expert(torch.tensor([[0, 3], [-1, 4]]), 4)
    2
    """
    if not _has_values(expert_ids):
        return expert_ids.numel()
    return int(((expert_ids >= 0) & (expert_ids < num_experts)).sum())


def _has_values(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.device.type != "meta"


def flops_of_kernel(kernel: Callable[..., Any]) -> Formula:
    """The operations of all ops that a kernel calls, counted on tensors without values."""

    def formula(*args: Any, out_val: Any = None) -> int:
        from torch.utils.flop_counter import FlopCounterMode

        def without_values(t: Any) -> Any:
            device = "cpu" if isinstance(t, Tensor) and t.device.type == "meta" else getattr(t, "device", None)
            return torch.empty(t.shape, dtype=t.dtype, device=device) if isinstance(t, Tensor) else t

        with fake_mode_of(args), FlopCounterMode(display=False) as counter:
            try:
                kernel(*tree_map(without_values, args))
            except data_dependent_error():  # the number of rows from other ranks is unknown without values
                return 0
        total: int = counter.get_total_flops()
        return total

    return formula
