"""Layouts of blocks in checkpoint files: names and axes from the rows of `moe_fn.families`, with their model types.

Where a model type has several rows (experts one by one, or fused), the names in the file decide.
"""

from dataclasses import dataclass, replace

from moe_fn.checkpoint.quantized.formats import Method
from moe_fn.families import FAMILIES
from moe_fn.families.tensor_names import EACH, Entry, TensorNames
from moe_fn.records import Path


@dataclass(frozen=True)
class Layout:
    """The tensors of a family's blocks in a file.

    name      of this row
    families  values of model_type
    block     name of the block's module in its layer, as "mlp" in "model.layers.3.mlp"; "" for none
    entries   its tensors
    others    names relative to the prefix that are not part of MoEWeights ("gate.*": every name with this beginning);
              {z} is a zero expert
    owned     beginnings of names, relative to the prefix, with which an unknown tensor is an error
    methods   quantization methods of this block's matrices, by their paths; only in rows that
              `checkpoint.quantized.layout` derived from others
    """

    name: str
    families: tuple[str, ...]
    block: str
    entries: tuple[Entry, ...]
    others: tuple[str, ...] = ()
    owned: tuple[str, ...] = ("",)
    methods: tuple[tuple[Path, Method], ...] = ()

    @property
    def savable(self) -> bool:
        """Whether the file's tensors can be computed from MoEWeights: not if one holds two banks of experts, or a
        weight is the product of two.
        """
        return not any(entry.scales or dict(entry.pins).keys() & {"T"} for entry in self.entries)

    @property
    def anchor(self) -> str:
        """The name of the down projection, which every block has."""
        return next(entry.name for entry in self.entries if entry.weight == ("down",))


def of_first_expert(name: str) -> str:
    """An entry's name for expert 0, of the first or the second bank.

    >>> of_first_expert("experts.{e}.w2.weight")
    'experts.0.w2.weight'
    """
    return name.replace("{e}", "0").replace("{second}", "0")


def _one_by_one(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """Returns the entries with a tensor for each expert, with biases if the experts have any; other entries stay."""
    experts = {("gate_up",), ("down",), ("gate_up_bias",), ("down_bias",)}
    biases = (
        Entry(("gate_up_bias",), "experts.{e}.gate_proj.bias", "I", (("G", 0),)),
        Entry(("gate_up_bias",), "experts.{e}.up_proj.bias", "I", (("G", 1),)),
        Entry(("down_bias",), "experts.{e}.down_proj.bias", "X"),
    )
    has_biases = any(entry.weight == ("down_bias",) for entry in entries)
    return EACH + (biases if has_biases else ()) + tuple(entry for entry in entries if entry.weight not in experts)


def _layouts() -> tuple[Layout, ...]:
    """Returns a layout for each way that families name their tensors, then those with experts one by one."""
    families: dict[TensorNames, dict[str, None]] = {}  # by row; the values are model types in order, each once
    for model in (model for family in FAMILIES for model in family.models):
        for row in model.files:
            families.setdefault(row, {}).update(dict.fromkeys([model.name, *(part.model for part in model.inside)]))
    layouts = {
        row: Layout(row.name, tuple(families[row]), row.block, row.entries, row.others, row.owned) for row in families
    }
    split = (
        replace(layout, name=f"{layout.name}, one by one", entries=_one_by_one(layout.entries))
        for row, layout in layouts.items()
        if row.also_split
    )
    return (*layouts.values(), *split)


LAYOUTS = _layouts()
