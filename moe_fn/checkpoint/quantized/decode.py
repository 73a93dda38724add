"""Decodes pieces of quantized matrices from a file's elements to codes in memory, and validates redundant tensors."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath

import torch
from torch import Tensor

from moe_fn.checkpoint.axes import Ranges, by_axes, of_axes, ranges_in_units
from moe_fn.checkpoint.match import Part, Plan
from moe_fn.checkpoint.quantized.codings import CODINGS, check_order, check_sizes, check_zeros
from moe_fn.checkpoint.quantized.layout import CODED, EXPERTS
from moe_fn.checkpoint.safetensors_files import open_tensors
from moe_fn.checkpoint.slices import Slices
from moe_fn.families.tensor_names import Entry, Units
from moe_fn.quant.codes import Codes, decoded
from moe_fn.quant.numbers import pack_halves
from moe_fn.records import Path
from moe_fn.weights.axes import axes_of, dims_of

INPUT_SCALES: frozenset[Path] = frozenset((("quant", "gate_up_input_scale"), ("quant", "down_input_scale")))
_AGREE = 1e-5  # tolerance between the input scales of gate and up, as in compressed-tensors


def to_codes(entry: Entry, source: Tensor, ranges: Ranges, units: Units, order: Sequence[str]) -> Tensor:
    """A piece of a file as codes or scales in memory, for these ranges of positions, with one dim for each axis of
    `order`.
    """
    coding, after = CODINGS[entry.coding], dict(entry.units)
    pieces = ranges_in_units(ranges, entry.units)
    lengths = {axis: stop - start for axis, (start, stop) in pieces.items()}
    starts = {axis: start for axis, (start, _) in pieces.items()}
    pattern = entry.axes.removesuffix(" P")  # in memory a block's bytes continue the axis of the inputs
    axes = axes_of(pattern)
    if coding.times > 1:
        split = dims_of(pattern)[coding.dim][-1]
        lengths[split], starts[split] = lengths[split] * coding.times, starts[split] * coding.times
        after[split] = (after.get(split) or 1) // coding.times
    source = by_axes(coding.decode(source), pattern, lengths, order)
    for dim, axis in enumerate(order):
        unit = after.get(axis, 1)
        if axis in ranges and unit is not None and axis in axes:
            first, last = ranges[axis][0] // unit, -(-ranges[axis][1] // unit)
            source = source.narrow(dim, first - starts[axis], last - first)
    inputs = order[-1]
    halves = (dict(units).get(inputs) or 1) == 2 and after.get(inputs, 1) == 1
    return pack_halves(source) if halves else source


def put_input_scale(part: Part, source: Tensor, target: Tensor) -> bool:
    """Copies the larger of the target and an input scale into the target: gate and up have the same inputs, which are
    rounded with the larger of both scales. Returns whether the part is an input scale.

    Raises ValueError if the scales of compressed-tensors' gate and up differ.
    """
    if part.entry.weight not in INPUT_SCALES:
        return False
    other = target.to(source.device)  # 0 before the first of the two
    if part.entry.coding == "float32, agreed" and bool(((other - source).abs() > _AGREE).logical_and(other != 0).any()):
        raise ValueError(
            f"{part.name} is {float(source.flatten()[0])}; expected {float(other.flatten()[0])} as in the other half "
            "of gate_up"
        )
    target.copy_(torch.maximum(other, source))
    return True


def check_parts(folder: FilePath, plan: Plan, experts: Sequence[int]) -> None:
    """Validates redundant tensors (g_idx, shapes, zero points) of these experts."""
    wanted = [part for part in plan.checks if part.expert is None or part.expert in experts]
    for file, parts in itertools.groupby(sorted(wanted, key=lambda part: part.info.file), lambda part: part.info.file):
        with open_tensors(folder / file) as opened:
            for part in parts:
                _check_part(f"{folder / file}: {part.name}", opened.get_tensor(part.name), part, plan)


def _check_part(where: str, t: Tensor, part: Part, plan: Plan) -> None:
    quant, role = dict(plan.layout.methods)[part.entry.weight[:-1]].quant, part.entry.weight[-1]
    if role == "check sizes":
        check_sizes(where, t, _sizes(part, plan))
    elif role == "check order":
        check_order(where, t, quant.tile[1])
    else:
        check_zeros(where, CODINGS[part.entry.coding].decode(t), 2 ** (quant.row.bits - 1))


def _sizes(part: Part, plan: Plan) -> tuple[int, ...]:
    """The sizes (outputs, inputs) of the matrix that a part belongs to."""
    codes = next(
        entry
        for entry in plan.layout.entries
        if entry.weight in (part.entry.weight[:-1], (*part.entry.weight[:-1], "codes"))
    )
    return tuple(plan.sizes[axis] for axis in axes_of(codes.axes) if axis not in "EGBN")


def decode_others(
    plan: Plan, weights: dict[Path, Tensor], dtype: torch.dtype | None, read: Slices, wanted: Slices
) -> None:
    """Replaces the codes of quantized matrices other than the experts' by floats, which their products take.

    Whole tiles have been read; the wanted slice is cut from the floats.
    """
    start, stop = (place - read.shared_intermediate[0] for place in wanted.shared_intermediate)
    for path, method in plan.layout.methods:
        if path in EXPERTS or (*path, "codes") not in weights:
            continue
        found: Mapping[str, Tensor] = {
            role: weights.pop((*path, role)).unsqueeze(0) for role in CODED if (*path, role) in weights
        }
        halves = plan.sizes["B"] if path == ("shared", "gate_up") else 1
        floats = decoded(method.quant, Codes(**found), halves, plan.dtypes[path] if dtype is None else dtype)[0]
        pattern = plan.places[path].pattern
        order = axes_of(pattern)
        if "M" in order and read != wanted:
            tiles = by_axes(floats, pattern, read.sizes(plan.sizes), order)
            floats = of_axes(tiles.narrow(order.index("M"), start, stop - start), order, pattern)
        weights[path] = floats
