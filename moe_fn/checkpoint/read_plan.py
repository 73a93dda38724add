"""Reads the tensors of a plan: each is allocated once, and pieces of memory-mapped files are copied into it."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from moe_fn.checkpoint.axes import Ranges, by_axes, in_units, ranges_in_units, rectangles, spans
from moe_fn.checkpoint.match import Part, Plan
from moe_fn.checkpoint.quantized.decode import INPUT_SCALES, check_parts, decode_others, put_input_scale, to_codes
from moe_fn.checkpoint.quantized.layout import Place, base_of
from moe_fn.checkpoint.safetensors_files import BITS, TensorInfo, open_tensors
from moe_fn.checkpoint.slices import Slices, is_added_here
from moe_fn.records import WEIGHT_PATHS, MoEWeights, Path, weights_of_leaves
from moe_fn.weights.axes import axes_of, shape_of

# Pages of a mapped file count as this process' memory until it is unmapped: the file is mapped again after one piece,
# or after pieces of this many bytes together.
_WINDOW = 16 * 2**20


@dataclass(frozen=True)
class Piece:
    """One rectangle of a tensor in a file, and its index along E in memory."""

    part: Part
    ranges: Ranges  # along the axes of the file's tensor
    place: int | None  # index along E of the tensor in memory; None for all


def read_weights(folder: FilePath, plan: Plan, slices: Slices, dtype: torch.dtype | None, device: Any) -> MoEWeights:
    """The slices of the weights that a plan describes."""
    plan = dataclasses.replace(
        plan, parts={path: parts for path, parts in plan.parts.items() if is_added_here(slices, path)}
    )
    _check_tiles(plan, slices)
    check_parts(folder, plan, slices.experts)
    read = {path: _whole_tiles(plan, slices) if base_of(path) != path else slices for path in plan.parts}
    weights = {
        path: torch.empty(
            shape_of(place.pattern, in_units(read[path].sizes(plan.sizes), place.units)),
            dtype=plan.dtypes[path] if dtype is None or _keeps(path, plan) else dtype,
            device=device,
        )
        for path, place in ((path, plan.places[path]) for path in plan.parts)
    }
    for path in INPUT_SCALES & weights.keys():
        weights[path].zero_()
    pieces = [
        (path, piece)
        for path, parts in plan.parts.items()
        for part in parts
        for piece in _pieces(part, plan, read[path])
    ]
    pieces.sort(key=_turn)
    for (_, file), found in itertools.groupby(pieces, lambda piece: _turn(piece)[:2]):
        _copy_pieces(folder / file, list(found), weights, plan, read)
    decode_others(plan, weights, dtype, _whole_tiles(plan, slices), slices)
    return weights_of_leaves([weights.get(path) for path in WEIGHT_PATHS])


def _check_tiles(plan: Plan, slices: Slices) -> None:
    """Raises ValueError if a slice of experts that stay quantized splits a byte or a tile with one scale."""
    start, stop = slices.intermediate
    for path in plan.parts:
        unit = dict(plan.places[path].units).get("I") or 1
        if start % unit or (stop % unit and stop != plan.sizes["I"]):
            raise ValueError(
                f"intermediate is {start}..{stop}; expected multiples of {unit}, which share a scale or a byte"
            )


def _whole_tiles(plan: Plan, slices: Slices) -> Slices:
    """The slices with the shared experts' range widened to whole tiles and bytes: they are dequantized, then cut."""
    units = [dict(plan.places[path].units).get("M") or 1 for path in plan.parts if base_of(path) != path]
    unit, (start, stop) = math.lcm(*units), slices.shared_intermediate
    return dataclasses.replace(
        slices, shared_intermediate=(start // unit * unit, min(-(-stop // unit) * unit, plan.sizes["M"]))
    )


def _turn(found: tuple[Path, Piece]) -> tuple[bool, str, int]:
    """Sorts pieces by file and position; pieces that scale others come last."""
    part = found[1].part
    return part.entry.scales, part.info.file, part.info.start


def _keeps(path: Path, plan: Plan) -> bool:
    """Whether a tensor keeps the dtype of the file: the router (a bfloat16 correction bias could not be balanced),
    codes, and scales.
    """
    return path[0] == "router" or any(part.entry.coding for part in plan.parts[path])


def _pieces(part: Part, plan: Plan, slices: Slices) -> Iterator[Piece]:
    """The rectangles of a tensor that a rank needs, one expert at a time."""
    axes = axes_of(part.entry.axes)
    cut = slices.ranges | {axis: (at, at + 1) for axis, at in part.entry.pins}
    ranges = {axis: bounds for axis, bounds in cut.items() if axis in axes}
    wanted: list[tuple[int | None, dict[str, tuple[int, int]]]]
    if "E" in axes:
        wanted = [(place, {"E": (expert, expert + 1)}) for place, expert in enumerate(slices.experts)]
    elif part.expert is not None:
        wanted = [(place, {}) for place, expert in enumerate(slices.experts) if expert == part.expert]
    else:
        wanted = [(None, {})]
    for place, expert in wanted:
        for rectangle in rectangles(part.entry.axes, plan.sizes, ranges | expert):
            yield Piece(part, rectangle, place)


def _copy_pieces(
    file: FilePath,
    pieces: Sequence[tuple[Path, Piece]],
    weights: Mapping[Path, Tensor],
    plan: Plan,
    read: Mapping[Path, Slices],
) -> None:
    regions = [_region(piece, plan.sizes) for _, piece in pieces]
    extents = [_extent(piece.part.info, region) for (_, piece), region in zip(pieces, regions, strict=True)]
    scratch = torch.empty(max(extents), dtype=torch.uint8)  # pages are allocated when they are written
    done = 0
    while done < len(pieces):
        with open_tensors(file) as opened:
            mapped = 0
            while done < len(pieces) and (mapped == 0 or mapped + extents[done] <= _WINDOW):
                path, piece = pieces[done]
                source = opened.get_slice(piece.part.name)[regions[done]]
                _copy_piece(piece, source, weights[path], plan.places[path], read[path], plan.sizes, scratch)
                mapped += extents[done]
                done += 1
                del source


def _region(piece: Piece, sizes: Mapping[str, int]) -> tuple[slice, ...]:
    entry = piece.part.entry
    return spans(entry.axes, in_units(sizes, entry.units), ranges_in_units(piece.ranges, entry.units))


def _extent(info: TensorInfo, region: Sequence[slice]) -> int:
    """Bytes from the first to the last of a rectangle: pages between its rows are mapped too."""
    first = last = 0
    for size, part in zip(info.shape, region, strict=True):
        first, last = first * size + part.start, last * size + part.stop - 1
    return (last - first + 1) * BITS[info.dtype] // 8


def _copy_piece(
    piece: Piece,
    source: Tensor,
    target: Tensor,
    place: Place,
    slices: Slices,
    sizes: Mapping[str, int],
    scratch: Tensor,
) -> None:
    entry, units = piece.part.entry, place.units
    local, ranges = in_units(slices.sizes(sizes), units), ranges_in_units(piece.ranges, units)
    starts = ranges_in_units(slices.ranges, units)
    # batch axes first; a matrix is left, in its own order
    order = sorted(axes_of(place.pattern), key=lambda axis: axis not in "EGNB")
    target = by_axes(target, place.pattern, local, order)
    pins = dict(entry.pins) | ({} if piece.place is None else {"E": piece.place})
    for dim, axis in enumerate(order):
        if axis in pins:
            target = target.narrow(dim, pins[axis], 1)
        elif axis in ranges:
            start, stop = ranges[axis]
            target = target.narrow(dim, start - starts.get(axis, (0, 0))[0], stop - start)
    if entry.coding:
        source = to_codes(entry, source, piece.ranges, units, order)
    else:
        source = by_axes(
            source, entry.axes, {axis: stop - start for axis, (start, stop) in piece.ranges.items()}, order
        )
    if entry.scales:
        target.mul_(source.to(target.device)).mul_(source.numel() ** -0.5)
        return
    if put_input_scale(piece.part, source, target):
        return
    target.copy_(_in_rows(source, scratch))
    if entry.offset:
        target.add_(entry.offset)


def _in_rows(t: Tensor, scratch: Tensor) -> Tensor:
    """A transposed piece, copied to contiguous rows: torch transposes into a whole matrix far faster than into a
    part.
    """
    flat = t.squeeze()
    if (
        flat.ndim not in (2, 3)
        or flat.stride(-1) <= flat.stride(-2)
        or flat.numel() * flat.element_size() > scratch.numel()
    ):
        return t
    rows: Tensor = scratch[: flat.numel() * flat.element_size()].view(flat.dtype).view(flat.shape)
    for place in (...,) if flat.ndim == 2 else range(len(flat)):
        rows[place].copy_(flat[place])
    return rows.view(t.shape)
