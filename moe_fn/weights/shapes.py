"""Shapes and dtypes of all weights of a layer, plain or prepared, floats or codes, from the table of weights."""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_fn.config import MoEConfig, QuantConfig, config_of_json
from moe_fn.config.quant import ELEMENTS, SCALES
from moe_fn.records import WEIGHT_PATHS, Path, Shape
from moe_fn.torch_compat import constant_while_tracing
from moe_fn.weights.axes import size_of
from moe_fn.weights.panels import PANEL, num_panels, per_step_of
from moe_fn.weights.spec import (
    WEIGHTS,
    Kind,
    added_by_others,
    dims_of_weight,
    own_axis_sizes,
    parts_and_places,
    units_of_weight,
)

PER_TILE = ("scale", "zero_point")  # tensors with one value per tile; prepare_weights stores them in panels
MATRICES: tuple[Path, Path] = (("gate_up",), ("down",))  # weights that prepare_weights stores in panels


@dataclass(frozen=True)
class Expected:
    """Expected shape and dtypes of a weight. shape=None: the weight must be None, because the config does not use it or
    because another rank adds it. dtypes=None: any dtype of its kind.
    """

    path: Path
    name: str
    shape: Shape | None
    sizes: tuple[int, ...] | None
    required: bool
    kind: Kind
    dtypes: tuple[torch.dtype, ...] | None
    added_by_others: bool = False


def expected_weights(config: MoEConfig, prepared: bool = False) -> tuple[Expected, ...]:
    """Returns all expected weights in the order of WEIGHT_PATHS; prepared: with scales and zero points in panels.

    Cached by config.
    """
    return _expected_weights(config.json, prepared)


def expected_prepared(config: MoEConfig, dtype: torch.dtype) -> tuple[Expected, Expected]:
    """Returns the expected prepared gate_up and down in this dtype. Cached by config."""
    return _expected_prepared(config.json, dtype)


def expected_shapes(config: MoEConfig) -> dict[Path, tuple[Shape, bool]]:
    """Returns (shape, whether it is required) of every weight that the config uses; other weights must be None."""
    return {row.path: (row.shape, row.required) for row in expected_weights(config) if row.shape is not None}


# Not traced: the result is a constant of the graph and adds no guards.
@constant_while_tracing
def _expected_weights(text: str, prepared: bool) -> tuple[Expected, ...]:
    return _expected_of_json(text, prepared)


@constant_while_tracing
def _expected_prepared(text: str, dtype: torch.dtype) -> tuple[Expected, Expected]:
    return _prepared_of_json(text, dtype)


@functools.lru_cache(maxsize=1024)
def _expected_of_json(text: str, prepared: bool) -> tuple[Expected, ...]:
    config = config_of_json(text)
    in_panels = prepared_shapes_per_tile(config.own) if prepared else {}
    others, sizes = added_by_others(config), own_axis_sizes(config)
    rows = []
    for path in WEIGHT_PATHS:
        used = WEIGHTS[path].used(config) and path not in others
        row = _expected(config, path, (in_panels.get(path) or _shape(config, path, sizes)) if used else None)
        rows.append(replace(row, added_by_others=path in others))
    return tuple(rows)


@functools.lru_cache(maxsize=1024)
def _prepared_of_json(text: str, dtype: torch.dtype) -> tuple[Expected, Expected]:
    config = config_of_json(text)
    names = ("num_experts", "panels", "steps", "columns of a step")
    gate_up, down = (tuple(zip(names, shape, strict=True)) for shape in prepared_shapes(config.own, dtype))
    return _expected(config, MATRICES[0], gate_up), _expected(config, MATRICES[1], down)


def _expected(config: MoEConfig, path: Path, shape: Shape | None) -> Expected:
    row, quant = WEIGHTS[path], config.quant
    kind: Kind = "compute" if row.kind == "codes" and quant is None else row.kind
    dtypes = None if quant is None else _dtypes_of_quant(quant).get(kind)
    sizes = None if shape is None else tuple(size for _, size in shape)
    return Expected(path, f"weights.{'.'.join(path)}", shape, sizes, shape is not None and row.required, kind, dtypes)


def _dtypes_of_quant(quant: QuantConfig) -> dict[Kind, tuple[torch.dtype, ...]]:
    """Returns the dtypes of codes, scales and zero points."""
    return {
        "codes": (torch.uint8 if quant.zero_points else ELEMENTS[quant.row.element].dtype,),
        "scale": SCALES[quant.row.scale],
        "zero_point": (torch.uint8,),
        "global_scale": (torch.float32,),
        "input_scale": (torch.float32,),
    }


_NAMES = {
    "E": "num_experts", "G": "halves", "I": "intermediate_size", "X": "expert_hidden_size", "H": "hidden_size",
    "L": "latent.size",
    "C": "num_logits", "D": "num_choices", "Z": "zero_experts.count", "V": "vocabulary", "K": "top_k",
    "A": "num_adapters", "R": "rank",
    "slots": "num_physical", "logical": "num_experts", "replicas": "max replicas", "1": "1", "all": "1 of all experts",
}  # fmt: skip
_NAMES_OF_TILES = ("num_experts", "tiles of outputs", "tiles of inputs")
_NAMES_OF_GLOBAL_SCALE = ("num_experts", "halves", "1")


def _shape(config: MoEConfig, path: Path, sizes: dict[str, int]) -> Shape:
    """Returns (name, size) of each dim of a weight, with these sizes of axes."""
    kind, units = WEIGHTS[path].kind, units_of_weight(config, path)
    shape = []
    for place, (dim, unit) in enumerate(zip(dims_of_weight(config, path), units, strict=True)):
        parts, places = parts_and_places(dim, sizes)
        size = size_of(dim, sizes) if unit == 1 else parts * (1 if unit is None else -(-places // unit))
        name = _name(config, dim)
        if kind in PER_TILE:
            name = _NAMES_OF_TILES[place]
        elif kind == "global_scale":
            name = _NAMES_OF_GLOBAL_SCALE[place]
        elif unit != 1:
            name = f"{name} / {unit}"
        shape.append((name, size))
    return tuple(shape)


def _name(config: MoEConfig, dim: tuple[str, ...]) -> str:
    if dim in (("B", "N", "M"), ("N", "M")):
        return "shared gate_up" if "B" in dim else "shared width"
    if dim in (("G", "I"), ("I", "G")):
        return "2 * intermediate_size" if config.gate_up_parts == 2 else "intermediate_size"
    if dim == ("W",):
        return _NAMES["H" if config.router.gate_input == "original" else "X"]
    return _NAMES[dim[0]]


def is_prepared(weight: Tensor) -> bool:
    """Whether a gate_up or down is prepared, stored in panels."""
    return weight.ndim == 4


def prepared_shapes(config: MoEConfig, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of prepared gate_up and down in this dtype (of codes: any dtype of one byte)."""
    per_byte, per_step = (
        (1, per_step_of(dtype)) if config.quant is None else (config.quant.per_byte, per_step_of(torch.uint8))
    )

    def shape(name: str, inner: int) -> tuple[int, ...]:
        return config.num_experts, num_panels(config, name), -(-inner // (per_byte * per_step)), PANEL * per_step

    return shape("gate_up", config.expert_hidden_size), shape("down", config.intermediate_size)


def prepared_shapes_per_tile(config: MoEConfig) -> dict[Path, Shape]:
    """Returns the shapes of scales and zero points in panels."""
    names = ("num_experts", "panels", "tiles of inputs", "columns of a panel")
    shapes: dict[Path, Shape] = {}
    if config.quant is None:
        return shapes
    for name, inner in (("gate_up", config.expert_hidden_size), ("down", config.intermediate_size)):
        sizes = config.num_experts, num_panels(config, name), -(-inner // (config.quant.tile[1] or inner)), PANEL
        shapes |= {("quant", f"{name}_{kind}"): tuple(zip(names, sizes, strict=True)) for kind in PER_TILE}
    return shapes
