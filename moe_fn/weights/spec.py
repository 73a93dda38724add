"""The table of weights: axes, kind and use of every tensor of MoEWeights. Shapes, dtypes and the parts of ranks are
derived from it.

E experts           G gate, up (1 where not gated)           I intermediate    X width of the experts
N shared experts    B gate, up of the shared experts         M intermediate of a shared expert
H hidden            L latent        C logits, D choices, W width of the gate's input      Z zero experts
V vocabulary        K top_k         A adapters, R their rank        1 one
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moe_fn.config import MoEConfig, ParallelConfig, QuantConfig
from moe_fn.records import Path
from moe_fn.weights.axes import ANY, Dims, dims_of, size_of

Kind = Literal["codes", "compute", "float", "integer", "scale", "zero_point", "global_scale", "input_scale"]


def _always(config: MoEConfig) -> bool:
    return True


@dataclass(frozen=True)
class Weight:
    """A row of the table of weights.

    axes         its pattern (`moe_fn.weights.axes`) with weight_layout "out_in", gate_up_layout "packed" and
                 LoRAConfig(experts="each")
    kind         "compute": floats in the dtype of x; "float": floats of any dtype; "integer"; "codes": with
                 config.quant, else "compute"; the other four are scales and zero points of codes
    used         whether the config uses it
    required     whether it must be given if it is used
    added_after  for biases of a product, the axis that the product sums over: if ranks have slices of that axis, only
                 the rank with the first slice has the bias, because outputs are summed over ranks
    """

    axes: str
    kind: Kind = "float"
    used: Callable[[MoEConfig], bool] = _always
    required: bool = True
    added_after: str | None = None


def _shared(config: MoEConfig) -> bool:
    return config.shared is not None


def _latent(config: MoEConfig) -> bool:
    return config.latent is not None


def _lora(config: MoEConfig) -> bool:
    return config.lora is not None


def _copies(config: MoEConfig) -> bool:
    return config.parallel is not None and config.parallel.num_physical is not None


def _static(config: MoEConfig) -> bool:
    return config.quant is not None and config.quant.activations is not None and config.quant.activations.static


_MATRICES = {"gate_up": "E (G I) X", "down": "E X I"}
_TENSORS_OF_CODES: dict[Kind, Callable[[MoEConfig], bool]] = {
    "scale": lambda c: c.quant is not None,
    "zero_point": lambda c: c.quant is not None and c.quant.zero_points,
    "global_scale": lambda c: c.quant is not None and c.quant.row.has_global_scale,
    "input_scale": _static,
}
_ROWS = {
    **{name: Weight(axes, "codes") for name, axes in _MATRICES.items()},
    "gate_up_bias": Weight("E (G I)", required=False),
    "down_bias": Weight("E X", required=False, added_after="I"),
    "expert_norm": Weight("E X", used=lambda c: c.expert_norm is not None),
    "constants": Weight("Z H", used=lambda c: c.zero_experts is not None and c.zero_experts.kind == "constant"),
    "input_norm": Weight("H", used=lambda c: c.norms is not None and c.norms.input),
    "output_norm": Weight("H", used=lambda c: c.norms is not None and c.norms.output),
    "router.gate": Weight("C W", required=False),
    "router.bias": Weight("C", required=False),
    "router.correction_bias": Weight("D", used=lambda c: c.router.correction_bias != "none"),
    "router.expert_scale": Weight("C", required=False),
    "router.expert_ids_of_token": Weight("V K", "integer", used=lambda c: c.router.selection == "hash"),
    "router.logical_of_physical": Weight("slots", "integer", used=_copies),
    "router.physical_of_logical": Weight("logical replicas", "integer", used=_copies),
    "router.num_replicas": Weight("logical", "integer", used=_copies),
    "shared.gate_up": Weight("(B N M) H", "compute", used=_shared),
    "shared.down": Weight("H (N M)", "compute", used=_shared),
    "shared.gate_up_bias": Weight("(B N M)", used=_shared, required=False),
    "shared.down_bias": Weight("H", used=_shared, required=False, added_after="M"),
    "shared.gate": Weight("1 H", used=lambda c: c.shared is not None and c.shared.gate == "sigmoid"),
    "latent.input": Weight("L H", "compute", used=_latent),
    "latent.output": Weight("H L", "compute", used=_latent),
    "latent.input_bias": Weight("L", used=_latent, required=False),
    "latent.output_bias": Weight("H", used=_latent, required=False),
    "latent.input_norm": Weight("L", used=_latent, required=False),
    "latent.output_norm": Weight("L", used=_latent, required=False),
    "lora.gate_up_a": Weight("A E R X", "compute", used=_lora, required=False),
    "lora.gate_up_b": Weight("A E (G I) R", "compute", used=_lora, required=False),
    "lora.down_a": Weight("A E R I", "compute", used=_lora, required=False),
    "lora.down_b": Weight("A E X R", "compute", used=_lora, required=False),
    **{
        f"quant.{name}_{kind}": Weight("E" if kind == "input_scale" else axes, kind, used=used)
        for kind, used in _TENSORS_OF_CODES.items()
        for name, axes in _MATRICES.items()
    },
}
# in the order of records.WEIGHT_PATHS
WEIGHTS: dict[Path, Weight] = {tuple(name.split(".")): row for name, row in _ROWS.items()}
_DIMS: dict[Path, Dims] = {path: dims_of(row.axes) for path, row in WEIGHTS.items()}

# The expert dim of the weights that have one; the others (router, shared experts, constants ...) are the same on all
# ranks of ep.
EXPERT_DIMS: dict[Path, int] = {path: dims.index(("E",)) for path, dims in _DIMS.items() if ("E",) in dims}
# weights whose first dim is the expert dim: all but the adapters
EXPERT_PATHS = tuple(path for path, dim in EXPERT_DIMS.items() if dim == 0)
FIRST_SLICE_ONLY = tuple(path for path, row in WEIGHTS.items() if row.added_after is not None)


def fields_without(*axes: str) -> tuple[str, ...]:
    """Returns the fields of MoEWeights whose tensors have none of these axes.

    >>> fields_without("E", "M")
    ('constants', 'input_norm', 'output_norm', 'router', 'latent')
    """
    having = {path[0] for path, dims in _DIMS.items() for dim in dims if set(dim) & set(axes)}
    return tuple(dict.fromkeys(path[0] for path in WEIGHTS if path[0] not in having))


def axis_sizes(config: MoEConfig) -> dict[str, int]:
    """Returns the size of every axis in the whole layer."""
    shared, latent, zero, lora = config.shared, config.latent, config.zero_experts, config.lora
    return {
        "E": config.num_experts,
        "G": config.gate_up_parts,
        "I": config.intermediate_size,
        "X": config.expert_hidden_size,
        "H": config.hidden_size,
        "N": shared.count if shared else 0,
        "B": shared.gate_up_parts if shared else 1,
        "M": shared.intermediate_size if shared else 0,
        "L": latent.size if latent else 0,
        "C": config.num_logits,
        "D": config.num_choices,
        "W": config.hidden_size if config.router.gate_input == "original" else config.expert_hidden_size,
        "Z": zero.count if zero else 0,
        "V": ANY,
        "K": config.top_k,
        "A": lora.num_adapters if lora else 0,
        "R": lora.rank if lora else 0,
        "slots": (config.parallel.num_physical if config.parallel else None) or 0,
        "logical": config.num_experts,
        "replicas": ANY,
        "1": 1,
        "all": 1,
    }


def slices_of_axes(parallel: ParallelConfig | None) -> dict[str, tuple[int, int]]:
    """Returns {axis: (number of slices, index of this rank's slice)} of the axes that are cut over ranks."""
    return {} if parallel is None else {"I": parallel.slices, "M": parallel.slices_of_shared}


def own_axis_sizes(config: MoEConfig) -> dict[str, int]:
    """Returns the size of every axis in this rank's part."""
    sizes = axis_sizes(config)
    return (
        sizes
        | {"E": config.own.num_experts}
        | {axis: sizes[axis] // n for axis, (n, _) in slices_of_axes(config.parallel).items()}
    )


def dims_of_weight(config: MoEConfig, path: Path) -> Dims:
    """Returns the axes of each dim of a weight, in the layouts of the config."""
    dims = _DIMS[path]
    if config.gate_up_layout == "interleaved":
        dims = tuple(("I", "G") if dim == ("G", "I") else dim for dim in dims)
    if config.weight_layout == "in_out" and path[0] in _MATRICES:
        dims = dims[0], dims[2], dims[1]
    if config.lora is not None and path[0] == "lora" and config.lora.shares(path[1]):
        dims = tuple(("all",) if dim == ("E",) else dim for dim in dims)
    return dims


def plain_sizes(config: MoEConfig, path: Path) -> tuple[int, ...]:
    """Returns the shape of a weight of the whole layer on one rank, not prepared, without config.quant.

    >>> plain_sizes(MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=6), ("gate_up",))
    (4, 12, 8)
    """
    sizes = axis_sizes(config)
    return tuple(size_of(dim, sizes) for dim in dims_of_weight(config, path))


_UNITS: dict[Kind, Callable[[QuantConfig], tuple[int | None, int | None]]] = {
    "codes": lambda quant: (1, quant.per_byte),
    "scale": lambda quant: quant.tile,
    "zero_point": lambda quant: quant.tile,
    "global_scale": lambda quant: (None, None),
}


def units_of_weight(config: MoEConfig, path: Path) -> tuple[int | None, ...]:
    """Returns the number of matrix entries per element along each dim, such as a scale's tile; None: the whole dim,
    with gates and ups separate.
    """
    units = _UNITS.get(WEIGHTS[path].kind)
    return (1,) * len(_DIMS[path]) if units is None or config.quant is None else (1, *units(config.quant))


def parts_and_places(dim: tuple[str, ...], sizes: dict[str, int]) -> tuple[int, int]:
    """Returns (number of parts of a dim that are cut and tiled separately, such as gates and ups; size of a part).

    >>> parts_and_places(("G", "I"), {"G": 2, "I": 6}), parts_and_places(("I", "G"), {"G": 2, "I": 6})
    ((2, 6), (1, 12))
    """
    first = next((place for place, axis in enumerate(dim) if axis not in ("G", "B", "N")), 0)
    return size_of(dim[:first], sizes), size_of(dim[first:], sizes)


def cut_of(config: MoEConfig, path: Path, axis: str) -> tuple[int, int] | None:
    """Returns (dim in which slices of an axis cut a weight, number of its parts that are cut separately); None if the
    weight is not cut.

    >>> cut_of(MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=6), ("gate_up",), "I")
    (1, 2)
    """
    for place, (dim, unit) in enumerate(zip(dims_of_weight(config, path), units_of_weight(config, path), strict=True)):
        if axis in dim and unit is not None:  # a scale of the whole matrix is not cut
            return place, parts_and_places(dim, axis_sizes(config))[0]
    return None


def added_by_others(config: MoEConfig) -> tuple[Path, ...]:
    """Returns the biases that this rank does not have because only the rank with the first slice adds them: outputs of
    slices are summed.
    """
    later = {axis for axis, (_, number) in slices_of_axes(config.parallel).items() if number > 0}
    return tuple(path for path in FIRST_SLICE_ONLY if WEIGHTS[path].added_after in later)
