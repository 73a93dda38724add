"""The shape and dtype of every weight of a layer by its config: plain or prepared, codes or floats.

Derived from the table of weights.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_fn.config import MoEConfig, QuantConfig, config_of_json
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

BESIDE = ("scale", "zero_point")  # of codes: what is laid with them
MATRICES: tuple[Path, Path] = (("gate_up",), ("down",))  # what prepare_weights lays


@dataclass(frozen=True)
class Expected:
    """What a weight is to be; shape None: it is not to be there, for another rank adds it or the config has no use for
    it.

    dtypes None: by its kind.
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
    """All weights in the order of WEIGHT_PATHS. prepared: what stands beside codes is that of prepared ones.

    Derived once a config.
    """
    return _expected_weights(config.json, prepared)


def expected_prepared(config: MoEConfig, dtype: torch.dtype) -> tuple[Expected, Expected]:
    """gate_up and down as prepare_weights lays them in this dtype. Derived once a config."""
    return _expected_prepared(config.json, dtype)


def expected_shapes(config: MoEConfig) -> dict[Path, tuple[Shape, bool]]:
    """Shape of every weight that fits the config, and whether it must be there; a weight not in the result
    must not be.
    """
    return {row.path: (row.shape, row.required) for row in expected_weights(config) if row.shape is not None}


# Without tracing: what the table says is a constant of a graph, and costs it no guard.
@constant_while_tracing
def _expected_weights(text: str, prepared: bool) -> tuple[Expected, ...]:
    return _expected_of_json(text, prepared)


@constant_while_tracing
def _expected_prepared(text: str, dtype: torch.dtype) -> tuple[Expected, Expected]:
    return _prepared_of_json(text, dtype)


@functools.lru_cache(maxsize=1024)
def _expected_of_json(text: str, prepared: bool) -> tuple[Expected, ...]:
    config = config_of_json(text)
    laid = prepared_beside_shapes(config.own) if prepared else {}
    others, sizes = added_by_others(config), own_axis_sizes(config)
    rows = []
    for path in WEIGHT_PATHS:
        there = WEIGHTS[path].there(config) and path not in others
        row = _expected(config, path, (laid.get(path) or _shape(config, path, sizes)) if there else None)
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
    """Dtypes that codes, and what stands beside them, may have."""
    codes = {"e4m3": torch.float8_e4m3fn, "int8": torch.uint8 if quant.zero_points else torch.int8}
    scales = {
        "float": (torch.float32, torch.bfloat16, torch.float16),
        "e8m0": (torch.uint8,),
        "e4m3": (torch.float8_e4m3fn,),
    }
    return {
        "codes": (codes.get(quant.row.element, torch.uint8),),
        "scale": scales[quant.row.scale],
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
_NAMES_OF_WHOLE = ("num_experts", "halves", "1")


def _shape(config: MoEConfig, path: Path, sizes: dict[str, int]) -> Shape:
    """Name and size of each dim of a weight, with these sizes of axes."""
    kind, units = WEIGHTS[path].kind, units_of_weight(config, path)
    shape = []
    for place, (dim, unit) in enumerate(zip(dims_of_weight(config, path), units, strict=True)):
        parts, places = parts_and_places(dim, sizes)
        size = size_of(dim, sizes) if unit == 1 else parts * (1 if unit is None else -(-places // unit))
        name = _name(config, dim)
        if kind in BESIDE:
            name = _NAMES_OF_TILES[place]
        elif kind == "global_scale":
            name = _NAMES_OF_WHOLE[place]
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
    """Whether a gate_up or down is one that prepare_weights has laid."""
    return weight.ndim == 4


def prepared_shapes(config: MoEConfig, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of prepared gate_up and down; dtype: theirs, or of codes any of one byte."""
    per_byte, per_step = (
        (1, per_step_of(dtype)) if config.quant is None else (config.quant.per_byte, per_step_of(torch.uint8))
    )

    def shape(name: str, inner: int) -> tuple[int, ...]:
        return config.num_experts, num_panels(config, name), -(-inner // (per_byte * per_step)), PANEL * per_step

    return shape("gate_up", config.expert_hidden_size), shape("down", config.intermediate_size)


def prepared_beside_shapes(config: MoEConfig) -> dict[Path, Shape]:
    """Shapes of scales and zero points that are laid with codes."""
    names = ("num_experts", "panels", "tiles of inputs", "columns of a panel")
    shapes: dict[Path, Shape] = {}
    if config.quant is None:
        return shapes
    for name, inner in (("gate_up", config.expert_hidden_size), ("down", config.intermediate_size)):
        sizes = config.num_experts, num_panels(config, name), -(-inner // (config.quant.tile[1] or inner)), PANEL
        shapes |= {("quant", f"{name}_{what}"): tuple(zip(names, sizes, strict=True)) for what in BESIDE}
    return shapes
