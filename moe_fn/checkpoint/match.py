"""Matches the tensors of a file with a row of the layout table: shapes and dtypes of a whole block are checked from the
headers before anything is allocated.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from moe_fn.checkpoint.axes import in_units, sizes_of
from moe_fn.checkpoint.folder import full_name
from moe_fn.checkpoint.layout import Layout
from moe_fn.checkpoint.quantized.codings import CODINGS
from moe_fn.checkpoint.quantized.layout import MATRICES, Place, base_of, is_check, places_of
from moe_fn.checkpoint.safetensors_files import FLOATS, INTEGERS, TensorInfo
from moe_fn.config import MoEConfig
from moe_fn.families.tensor_names import Entry
from moe_fn.records import Path
from moe_fn.weights.axes import ANY, dims_of, shape_of
from moe_fn.weights.shapes import expected_shapes
from moe_fn.weights.spec import WEIGHTS

_QUANTIZED = re.compile(
    r"(_blocks|_scales?|_scale_inv|_scale_2|\.qweight|\.qzeros|\.scales|\.g_idx|_packed|\.absmax|\.quant_map)$"
)


@dataclass(frozen=True)
class Part:
    """A tensor in a file that is, or is a part of, a tensor of MoEWeights; expert is the one in its name, or None."""

    entry: Entry
    expert: int | None
    name: str
    info: TensorInfo


@dataclass(frozen=True)
class Plan:
    """What to read: sizes of the axes, and for each tensor of MoEWeights its parts, its place and its dtype.

    The parts of a weight hold all of it. A quantized matrix other than the experts' is decoded from several tensors,
    whose paths have one more element than its own. `checks` are redundant tensors that are compared, not loaded.
    """

    layout: Layout
    sizes: Mapping[str, int]
    parts: Mapping[Path, tuple[Part, ...]]
    places: Mapping[Path, Place]
    dtypes: Mapping[Path, torch.dtype]
    checks: tuple[Part, ...] = ()


def beginnings_of(layout: Layout, prefix: str) -> tuple[str, ...]:
    """Beginnings of the names of all tensors that a block with this layout may have."""
    outside = [entry.name.split("{")[0] for entry in layout.entries if entry.name.startswith("../")]
    return tuple(dict.fromkeys(full_name(prefix, name) for name in ("", *layout.owned, *outside)))


def names_of(entry: Entry, config: MoEConfig, most: int | None = None) -> Iterator[tuple[int | None, str]]:
    """The names of an entry with the expert of each, for the first `most` experts."""
    experts = range(config.num_experts if most is None else min(config.num_experts, most))
    if "{e}" in entry.name:
        yield from ((e, entry.name.replace("{e}", str(e))) for e in experts)
    elif "{second}" in entry.name:
        yield from ((e, entry.name.replace("{second}", str(e + config.num_experts))) for e in experts)
    else:
        yield None, entry.name


def match(layout: Layout, prefix: str, config: MoEConfig, tensors: Mapping[str, TensorInfo]) -> Plan | list[str]:
    """The plan for reading a block, or its problems: every missing or unexpected tensor, wrong shape and wrong
    dtype.
    """
    allowed, problems = expected_shapes(config), list[str]()
    sizes, others, parts = sizes_of(config), set(_others(layout, prefix, config, tensors)), dict[Path, list[Part]]()
    known = set(others)
    most = len(tensors) + 1  # enough for one missing name, however many experts the config has
    for entry in layout.entries:
        named = [(expert, full_name(prefix, name)) for expert, name in names_of(entry, config, most)]
        known.update(name for _, name in named)
        if base_of(entry.weight) not in allowed:
            surplus = [name for _, name in named if name in tensors and name not in others]
            problems += [f"{name} is there; expected none, because the config does not use it" for name in surplus]
            continue
        found = [
            Part(_with_unit_dims(entry, sizes, tensors[name]), expert, name, tensors[name])
            for expert, name in named
            if name in tensors
        ]
        if found or not entry.optional:
            problems += [
                f"{name} is missing; expected {_expected(entry, sizes)}" for _, name in named if name not in tensors
            ]
        parts.setdefault(entry.weight, []).extend(found)
    problems += _halves(layout, prefix, parts) + _gates(layout, sizes, parts)
    owned = tuple(full_name(prefix, name) for name in layout.owned)
    problems += [
        f"{name} is there, {info.dtype} {list(info.shape)}; expected no tensor of this name below {prefix}"
        for name, info in tensors.items()
        if name not in known and name.startswith(owned)
    ]
    problems += [
        f"no tensor of the layout {layout.name!r} is weights.{'.'.join(path)}; expected one, as the config needs it"
        for path, (_, required) in allowed.items()
        if required and path not in {base_of(path) for path in parts}
    ]
    sizes, wrong = _fitted(parts, sizes)
    checks = tuple(part for path in list(parts) if is_check(path) for part in parts.pop(path))
    dtypes, wrong_dtypes = _dtypes(parts)
    problems += wrong + wrong_dtypes
    found_parts = {path: tuple(found) for path, found in parts.items() if found}
    return problems or Plan(layout, sizes, found_parts, places_of(config, layout), dtypes, checks)


def _with_unit_dims(entry: Entry, sizes: Mapping[str, int], info: TensorInfo) -> Entry:
    """The entry with the file's dims of size 1: tools store single numbers and columns with different numbers of
    them.
    """
    shape = shape_of(entry.axes, in_units(sizes, entry.units)) if entry.coding else info.shape
    if shape == info.shape or [size for size in shape if size != 1] != [size for size in info.shape if size != 1]:
        return entry
    dims = ["(" + " ".join(dim) + ")" for dim, size in zip(dims_of(entry.axes), shape, strict=True) if size != 1]
    axes = " ".join("1" if size == 1 else dims.pop(0) for size in info.shape)
    return dataclasses.replace(
        entry, axes=axes, units=tuple((axis, unit) for axis, unit in entry.units if axis in axes)
    )


def _others(layout: Layout, prefix: str, config: MoEConfig, tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    ranges = {"{e}": (0, config.num_experts), "{z}": (config.num_experts, config.num_choices)}
    ranges |= {"{second}": (config.num_experts, 2 * config.num_experts)}
    for other in layout.others:
        name = full_name(prefix, other)
        if name.endswith("*"):
            yield from (found for found in tensors if found.startswith(name[:-1]))
        placeholder = next((place for place in ranges if place in name), None)
        if placeholder is None:
            yield name
            continue
        before, _, after = name.partition(placeholder)
        numbered = (found for found in tensors if found.startswith(before) and found.endswith(after))
        yield from (
            found for found in numbered if _is_in(found[len(before) : len(found) - len(after)], *ranges[placeholder])
        )


def _is_in(number: str, first: int, stop: int) -> bool:
    return number.isdecimal() and len(number) < 20 and number == str(int(number)) and first <= int(number) < stop


def _halves(layout: Layout, prefix: str, parts: Mapping[Path, Sequence[Part]]) -> list[str]:
    """Problems of optional tensors that have one part in the file but not another."""
    found = {part.entry for of_path in parts.values() for part in of_path}
    return [
        f"{full_name(prefix, entry.name)} is missing; expected it with {parts[entry.weight][0].name}"
        for entry in layout.entries
        if entry.optional and entry not in found and parts.get(entry.weight)
    ]


def _gates(layout: Layout, sizes: Mapping[str, int], parts: Mapping[Path, Sequence[Part]]) -> list[str]:
    """Problems of tensors that have gates and ups in the layout but not in the config, or the reverse."""
    problems = []
    for path, axis in itertools.product(parts, "GB"):
        pinned = {
            dict(entry.pins)[axis] for entry in layout.entries if entry.weight == path and axis in dict(entry.pins)
        }
        if pinned and pinned != set(range(sizes[axis])):
            gated = "gates and ups" if len(pinned) == 2 else "no gates"
            problems.append(
                f"weights.{'.'.join(path)} has {gated} in the layout {layout.name!r}; expected an activation that is "
                f"{'gated' if len(pinned) == 2 else 'not gated'}"
            )
    return problems


def _fitted(parts: Mapping[Path, Sequence[Part]], sizes: Mapping[str, int]) -> tuple[dict[str, int], list[str]]:
    """The sizes, completed with those that only the file has, and problems of shapes that differ from them."""
    fitted, problems = dict(sizes), []
    for part in (part for found in parts.values() for part in found):
        for dim, size in zip(dims_of(part.entry.axes), part.info.shape, strict=False):
            fitted |= {axis: size for axis in dim if fitted[axis] == ANY}
        if shape_of(part.entry.axes, in_units(fitted, part.entry.units)) != part.info.shape:
            problems.append(f"{part.name} is {list(part.info.shape)}; expected {_expected(part.entry, fitted)}")
        problems += _straddling(part, fitted)
    return fitted, problems


def _straddling(part: Part, sizes: Mapping[str, int]) -> list[str]:
    """Problems of elements that cover positions of both gates and ups, or of two shared experts: slices cannot split
    them.
    """
    units = dict(part.entry.units)
    return [
        f"{part.name} has elements for {units[dim[-1]]} positions along {' '.join(dim)}; "
        f"expected {sizes[dim[-1]]} to be a multiple"
        for dim in dims_of(part.entry.axes)
        if (units.get(dim[-1]) or 1) > 1
        and sizes[dim[-1]] % (units[dim[-1]] or 1)
        and math.prod(sizes[axis] for axis in dim[:-1]) > 1
    ]


def _dtypes(parts: Mapping[Path, Sequence[Part]]) -> tuple[dict[Path, torch.dtype], list[str]]:
    """The dtype of each tensor in memory, and problems of dtypes.

    The parts of a tensor must have the same dtype, and so must all matrices of the block.
    """
    dtypes: dict[Path, torch.dtype] = {}
    problems = []
    matrices = [part for path in MATRICES for part in parts.get(path, ()) if not part.entry.coding]
    for path, found in parts.items():
        for part in found:
            coding = part.entry.coding
            choices = (
                CODINGS[coding].dtypes
                if coding
                else INTEGERS
                if path in WEIGHTS and WEIGHTS[path].kind == "integer"
                else FLOATS
            )
            first = matrices[0] if path in MATRICES and not coding else found[0]
            if part.info.dtype not in choices:
                problems.append(f"{part.name} is {part.info.dtype}; expected one of {', '.join(choices)}")
            elif part.info.dtype != first.info.dtype:
                problems.append(f"{part.name} is {part.info.dtype}; expected {first.info.dtype}, as {first.name}")
            else:
                dtypes[path] = torch.float32 if part.entry.offset else choices[part.info.dtype]
    return dtypes, problems


def quantized(prefix: str, layouts: Sequence[Layout], tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Names of tensors below the prefix that occur only in quantized checkpoints."""
    names = [name for layout in layouts for name in (*layout.others, *(entry.name for entry in layout.entries))]
    known = {full_name(prefix, name) for name in names}
    below = {name: info for name, info in tensors.items() if name.startswith(prefix + ".") and name not in known}
    named = [name for name in below if _QUANTIZED.search(name)]
    return named + [
        name for name, info in tensors.items() if info.dtype.startswith(("F8", "F6", "F4")) and name not in named
    ]


def strangers(layout: Layout, prefix: str, tensors: Mapping[str, TensorInfo]) -> int:
    """The number of tensors below the prefix whose names are not in the layout, for any config."""
    names = [entry.name for entry in layout.entries] + list(layout.others)
    known = re.compile(
        "|".join(
            re.sub(r"\\\{\w+\\\}", r"\\d+", re.escape(full_name(prefix, name))).replace(r"\*", ".*") for name in names
        )
    )
    return sum(name.startswith(prefix + ".") and known.fullmatch(name) is None for name in tensors)


def _expected(entry: Entry, sizes: Mapping[str, int]) -> str:
    sizes = in_units(sizes, entry.units)
    return f"{entry.axes} = {['any' if size == ANY else size for size in shape_of(entry.axes, sizes)]}".replace("'", "")
