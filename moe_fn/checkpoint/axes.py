"""Axis patterns of tensors in files and in memory, written as in einops, and views that map one onto the other.

The axes are those of `moe_fn.weights.spec`; files have three more: 2 (two numbers), T (banks of experts: text, vision)
and P (bytes of a block, gpt-oss). "E (G I) X" is [E, G * I, X] with all gates before all ups, in "E (I G) X" they
alternate, "(E I) X" is flat. A copy between two patterns permutes both sides to the same order of axes.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.families.tensor_names import Units
from moe_fn.records import Path
from moe_fn.weights.axes import axes_of, dims_of, pattern_of
from moe_fn.weights.spec import WEIGHTS, axis_sizes, dims_of_weight

Ranges = Mapping[str, tuple[int, int]]  # start and stop along each axis; an axis without an entry is whole


def in_units(sizes: Mapping[str, int], units: Units) -> dict[str, int]:
    """The number of elements along each axis.

    >>> in_units({"X": 65, "I": 4}, (("X", 32), ("I", None)))
    {'X': 3, 'I': 1}
    """
    return dict(sizes) | {axis: 1 if unit is None else -(-sizes[axis] // unit) for axis, unit in units}


def ranges_in_units(ranges: Ranges, units: Units) -> dict[str, tuple[int, int]]:
    """The ranges of elements that cover these ranges of positions.

    >>> ranges_in_units({"X": (4, 12), "I": (1, 2)}, (("X", 8), ("I", None)))
    {'X': (0, 2), 'I': (0, 1)}
    """
    scaled = {
        axis: (0, 1) if unit is None else (ranges[axis][0] // unit, -(-ranges[axis][1] // unit))
        for axis, unit in units
        if axis in ranges
    }
    return dict(ranges) | scaled


def by_axes(t: Tensor, pattern: str, sizes: Mapping[str, int], order: Sequence[str]) -> Tensor:
    """A view of t with one dim for each axis of `order`; axes that are not in the pattern have size 1.

    t has this pattern and these sizes. Every axis of the pattern that is not in `order` must have size 1.
    """
    axes = axes_of(pattern)
    t = t.view([sizes[axis] for axis in axes]) if t.is_contiguous() else _unflatten(t, pattern, sizes)
    dropped = [place for place, axis in enumerate(axes) if axis not in order]
    kept = [place for place, axis in enumerate(axes) if axis in order]
    t = t.permute(*kept, *dropped).reshape([t.shape[place] for place in kept]) if dropped else t
    found = [axis for axis in axes if axis in order]
    for axis in order:
        if axis not in found:
            t, found = t.unsqueeze(-1), [*found, axis]
    return t.permute([found.index(axis) for axis in order])


def _unflatten(t: Tensor, pattern: str, sizes: Mapping[str, int]) -> Tensor:
    for place, dim in reversed(list(enumerate(dims_of(pattern)))):
        t = t.unflatten(place, [sizes[axis] for axis in dim]) if len(dim) > 1 else t
    return t


def of_axes(t: Tensor, order: Sequence[str], pattern: str) -> Tensor:
    """The inverse of by_axes: a contiguous tensor of the pattern, from one with one dim for each axis of `order`."""
    axes = axes_of(pattern)
    order = [*order, *(axis for axis in axes if axis not in order)]
    t = t.reshape([*t.shape, *[1] * (len(order) - t.ndim)])
    t = t.permute(
        [order.index(axis) for axis in axes] + [place for place, axis in enumerate(order) if axis not in axes]
    )
    shape, at = [], 0
    for dim in dims_of(pattern):
        shape.append(math.prod(t.shape[at : at + len(dim)]))
        at += len(dim)
    return t.reshape(shape).contiguous()


def spans(pattern: str, sizes: Mapping[str, int], ranges: Ranges) -> tuple[slice, ...]:
    """The slice of each dim that holds the ranges.

    In a dim of several axes, the ranges of all axes before one that is cut must have length 1.

    >>> spans("E (G I) X", {"E": 8, "G": 2, "I": 6, "X": 4}, {"E": (3, 4), "G": (1, 2), "I": (2, 5)})
    (slice(3, 4, None), slice(8, 11, None), slice(0, 4, None))
    """
    found = []
    for dim in dims_of(pattern):
        start, stop = 0, 1
        for axis in dim:
            first, last = ranges.get(axis, (0, sizes[axis]))
            start, stop = start * sizes[axis] + first, (stop - 1) * sizes[axis] + last
        found.append(slice(start, stop))
    return tuple(found)


def rectangles(pattern: str, sizes: Mapping[str, int], ranges: Ranges) -> Iterator[dict[str, tuple[int, int]]]:
    """The ranges, split into rectangles of the tensor: "E (G I) X" cut along I gives two, gates and ups."""
    cut = {axis for axis, (start, stop) in ranges.items() if (start, stop) != (0, sizes[axis])}
    outer = [axis for dim in dims_of(pattern) for place, axis in enumerate(dim) if cut & set(dim[place + 1 :])]
    whole = {axis: ranges.get(axis, (0, sizes[axis])) for axis in axes_of(pattern)}
    for places in itertools.product(*(range(*whole[axis]) for axis in outer)):
        yield whole | {axis: (place, place + 1) for axis, place in zip(outer, places, strict=True)}


def sizes_of(config: MoEConfig) -> dict[str, int]:
    """The size of every axis, including those that only files have."""
    return axis_sizes(config) | {"2": 2, "T": 2, "P": 16}


def patterns_of(config: MoEConfig) -> dict[Path, str]:
    """The pattern of every tensor of MoEWeights."""
    return {path: pattern_of(dims_of_weight(config, path)) for path in WEIGHTS}
