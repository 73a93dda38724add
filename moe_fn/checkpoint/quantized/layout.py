"""Derives a row of the layout table for a quantized checkpoint: its method stores each matrix in several tensors."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from moe_fn.checkpoint.axes import patterns_of
from moe_fn.checkpoint.folder import full_name
from moe_fn.checkpoint.layout import Layout, of_first_expert
from moe_fn.checkpoint.quantized.formats import FORMATS, SUFFIXES, Method, QuantDict, Stored
from moe_fn.checkpoint.quantized.methods import method_of
from moe_fn.checkpoint.safetensors_files import TensorInfo
from moe_fn.config import MoEConfig
from moe_fn.families.tensor_names import Entry, Units
from moe_fn.records import Path
from moe_fn.weights.axes import axes_of, dims_of
from moe_fn.weights.spec import WEIGHTS

EXPERTS: tuple[Path, ...] = (("gate_up",), ("down",))
# Matrices of products, and the axis of each one's inputs. Those that are not experts are read as floats.
_INPUTS: dict[Path, str] = {
    path: axes_of(row.axes)[-1]
    for path, row in WEIGHTS.items()
    if row.kind in ("codes", "compute") and path[0] != "lora"
}
MATRICES = tuple(_INPUTS)
CODED = ("codes", "scale", "zero_point", "global_scale")  # tensors from which a matrix other than experts is decoded
Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Place:
    """Layout of a tensor in memory: its pattern, and the positions that one element covers."""

    pattern: str
    units: Units = ()


def base_of(path: Path) -> Path:
    """The path of the weight that a part of a quantized matrix, or a redundant tensor, belongs to."""
    return path[:-1] if path[-1] in CODED or is_check(path) else path


def is_check(path: Path) -> bool:
    """Whether tensors of this path are redundant: validated, not loaded."""
    return path[-1].startswith("check ")


def quantized_layout(row: Layout, prefix: str, quant_dict: QuantDict, num_experts: int, tensors: Tensors) -> Layout:
    """The row with the tensors of each matrix's method; the same row if nothing is quantized.

    Raises ValueError for methods that are unknown or contradict each other, and for those that no published file
    combines with this row.
    """
    entries: list[Entry] = []
    others, methods = list(row.others), dict[Path, Method]()
    for path in _INPUTS:
        found = _method(row, path, prefix, quant_dict, num_experts, tensors)
        methods |= {} if found is None else {path: found}
    first, last = (methods.get(path) for path in EXPERTS)
    if first != last:
        raise ValueError(
            f"{prefix}: the experts' gate_up is {_name(first)}, their down {_name(last)}; expected the same for both"
        )
    for entry in row.entries:
        if entry.weight not in methods:
            entries.append(entry)
            continue
        for stored in FORMATS[methods[entry.weight].stored]:
            made = _entry(entry, stored, methods[entry.weight], prefix, tensors)
            others += [made] if isinstance(made, str) else []
            entries += [made] if isinstance(made, Entry) else []
    return dataclasses.replace(row, entries=tuple(entries), others=tuple(others), methods=tuple(methods.items()))


def _method(
    row: Layout, path: Path, prefix: str, quant_dict: QuantDict, num_experts: int, tensors: Tensors
) -> Method | None:
    entries = [entry for entry in row.entries if entry.weight == path]
    names = sorted({full_name(prefix, name) for entry in entries for name in _names(entry, num_experts)})
    found = {name.removesuffix(".weight"): _method_of_name(name, path, quant_dict, tensors) for name in names}
    if len(set(found.values())) > 1:
        first = next(iter(found))
        other = next(module for module, method in found.items() if method != found[first])
        raise ValueError(f"{first} is {_name(found[first])} and {other} is {_name(found[other])}; expected the same")
    return next(iter(found.values()), None)


def _method_of_name(name: str, path: Path, quant_dict: QuantDict, tensors: Tensors) -> Method | None:
    module, fused = name.removesuffix(".weight"), not name.endswith(".weight")
    dtypes = {suffix: tensors[module + suffix].dtype for suffix in SUFFIXES if module + suffix in tensors}
    return method_of(quant_dict, module, path in EXPERTS, fused=fused, dtypes=dtypes)


def _names(entry: Entry, num_experts: int) -> list[str]:
    """Names for the first and the last expert; other experts are checked by their tensors."""
    return [entry.name.replace("{e}", str(e)).replace("{second}", str(e + num_experts)) for e in (0, num_experts - 1)]


def _name(method: Method | None) -> str:
    return "not quantized" if method is None else f"{method.stored!r}, {method.quant!r}"


def _entry(entry: Entry, stored: Stored, method: Method, prefix: str, tensors: Tensors) -> Entry | str:
    """The entry of one tensor of a quantized matrix; only its name if it is not used."""
    fused = not entry.name.endswith(".weight")
    names = [entry.name.removesuffix(".weight") + suffix for suffix in stored.suffixes(fused)]
    name = next((name for name in names if full_name(prefix, of_first_expert(name)) in tensors), next(iter(names), ""))
    expert, inputs = entry.weight in EXPERTS, method.quant.activations
    if stored.role == "input_scale" and not (expert and inputs is not None and inputs.static):
        return name or stored.suffix[0]
    if not name:
        raise ValueError(
            f"{full_name(prefix, entry.name)} holds all experts, quantized by {method.stored!r}; "
            "expected one tensor for each expert"
        )
    axes, units = _axes(entry, stored, method)
    weight = _path_of_role(entry.weight, stored.role)
    return Entry(weight, name, axes, entry.pins, optional=is_check(weight), coding=stored.coding, units=units)


def _path_of_role(path: Path, role: str) -> Path:
    """The path of a part of a matrix: experts stay codes, other matrices are decoded from theirs."""
    whole = (*path, role)
    if path not in EXPERTS or is_check(whole):
        return whole
    return path if role == "codes" else ("quant", f"{path[0]}_{role}")


def _axes(entry: Entry, stored: Stored, method: Method) -> tuple[str, Units]:
    """Pattern and units of a stored tensor, from those of the matrix."""
    lead, outputs, inputs = _split(entry.axes, entry.weight)
    if stored.dims in ("1", "2"):
        return stored.dims, ()
    # gpt-oss' floats are transposed, its mxfp4 blocks are not
    if dims_of(entry.axes)[-1] != inputs and method.stored != "mxfp4 blocks":
        raise ValueError(
            f"{entry.name} has its inputs before its outputs; expected outputs before inputs in a quantized matrix"
        )
    pattern, units = list(lead), list[tuple[str, int | None]]()
    for token in stored.dims.split():
        axis, _, unit = token.partition("/")
        dim = {"out": outputs, "in": inputs}.get(axis, (axis,))
        tile = method.quant.tile[axis == "in"]
        units += _units(dim, tile if unit == "tile" else int(unit or 1))
        pattern.append(f"({' '.join(dim)})" if len(dim) > 1 else dim[0])
    return " ".join(pattern), tuple(units)


def _split(pattern: str, path: Path) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The dim of the experts if there is one, the dim of the outputs, and the dim of the inputs."""
    dims = [dim for dim in dims_of(pattern) if dim != ("E",)]
    lead = ("E",) if len(dims) < len(dims_of(pattern)) else ()
    inputs = next(dim for dim in dims if _INPUTS[path] in dim)
    return lead, next(dim for dim in dims if dim != inputs), inputs


def _units(dim: tuple[str, ...], unit: int | None) -> Units:
    inner = [axis for axis in dim if axis not in "GBE"]  # gates and ups, and experts, do not share elements
    return tuple((axis, None) for axis in inner) if unit is None else ((inner[-1], unit),) if unit > 1 else ()


def places_of(config: MoEConfig, layout: Layout) -> dict[Path, Place]:
    """The places in memory of a layout's tensors: those of MoEWeights, and those from which matrices other than experts
    are decoded.

    Raises ValueError if the experts' gates and ups alternate in memory and several outputs share a scale.
    """
    patterns = patterns_of(config)
    places = {path: Place(pattern) for path, pattern in patterns.items()}
    for path, method in layout.methods:
        quant = method.quant
        mixed = path == ("gate_up",) and config.gate_up_layout == "interleaved"
        if mixed and (quant.tile[0] != 1 or quant.row.scale == "e4m3"):
            raise ValueError(
                f"gate_up_layout is 'interleaved' with {method.stored!r}; expected 'packed', because gates and ups "
                "have separate scales"
            )
        _, outputs, inputs = _split(patterns[path], path)
        tile, whole = quant.tile, (*_units(outputs, None), *_units(inputs, None))
        units: dict[str, Units] = {"codes": _units(inputs, quant.per_byte), "global_scale": whole}
        units |= dict.fromkeys(("scale", "zero_point"), (*_units(outputs, tile[0]), *_units(inputs, tile[1])))
        for role in CODED:
            places[_path_of_role(path, role)] = Place(patterns[path], units[role])
    return places
