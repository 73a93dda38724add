"""Where an element lies: patterns of named axes, the same words for a tensor in a file and for a tensor in memory.

    E experts           G gate, up (1 where not gated)           I intermediate    X width of the experts
    N shared experts    B gate, up of the shared experts         M intermediate of a shared expert
    H hidden            L latent        C logits, D choices, W width of the gate's input      Z zero experts
    V vocabulary        K top_k         1, 2 one, two            T banks of experts (text, vision)        P bytes of a block (gpt-oss)

"E (G I) X" is [E, G * I, X] with all gates before all ups, "E (I G) X" has them alternate, "(E I) X" is flat: as in einops.
A copy from one pattern to another needs no code of its own: both sides are brought into the order of the axes of one of them.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.records import Path

Dims = tuple[tuple[str, ...], ...]  # axes of each dim
Ranges = Mapping[str, tuple[int, int]]  # start and stop along axes; all of an axis that is not in it
Units = tuple[tuple[str, int | None], ...]  # places along an axis that one element is for; None: all of them; 1 where it is not said
_TILED = ("scale", "zero_point", "global_scale")
ANY = -1  # the size of an axis that the file decides


def dims_of(pattern: str) -> Dims:
    """The axes of each dim of a pattern.

    >>> dims_of("E (G I) X")
    (('E',), ('G', 'I'), ('X',))
    """
    dims: list[tuple[str, ...]] = []
    inside = False
    for word in pattern.replace("(", " ( ").replace(")", " ) ").split():
        if word in "()":
            inside = word == "("
            dims += [()] if inside else []
        elif inside:
            dims[-1] += (word,)
        else:
            dims.append((word,))
    return tuple(dims)


def axes_of(pattern: str) -> tuple[str, ...]:
    """All axes of a pattern, in order.

    >>> axes_of("E (G I) X")
    ('E', 'G', 'I', 'X')
    """
    return tuple(itertools.chain.from_iterable(dims_of(pattern)))


def shape_of(pattern: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor of this pattern; ANY where an axis has any size.

    >>> shape_of("E (G I) X", {"E": 8, "G": 2, "I": 3, "X": 4})
    (8, 6, 4)
    """
    dims = dims_of(pattern)
    return tuple(ANY if any(sizes[axis] == ANY for axis in dim) else math.prod(sizes[axis] for axis in dim) for dim in dims)


def in_units(sizes: Mapping[str, int], units: Units) -> dict[str, int]:
    """Elements along each axis.

    >>> in_units({"X": 65, "I": 4}, (("X", 32), ("I", None)))
    {'X': 3, 'I': 1}
    """
    return dict(sizes) | {axis: 1 if unit is None else -(-sizes[axis] // unit) for axis, unit in units}


def ranges_in_units(ranges: Ranges, units: Units) -> dict[str, tuple[int, int]]:
    """The elements that the places in the ranges are in.

    >>> ranges_in_units({"X": (4, 12), "I": (1, 2)}, (("X", 8), ("I", None)))
    {'X': (0, 2), 'I': (0, 1)}
    """
    scaled = {
        axis: (0, 1) if unit is None else (ranges[axis][0] // unit, -(-ranges[axis][1] // unit)) for axis, unit in units if axis in ranges
    }
    return dict(ranges) | scaled


def by_axes(t: Tensor, pattern: str, sizes: Mapping[str, int], order: Sequence[str]) -> Tensor:
    """A view of t with one dim for each axis of `order`; axes that the pattern lacks have size 1.

    t has the pattern and these sizes. Every axis of the pattern that is not in `order` must have size 1.
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
    """The inverse of by_axes: one dim for each axis of `order` -> a tensor of the pattern, contiguous."""
    axes = axes_of(pattern)
    order = [*order, *(axis for axis in axes if axis not in order)]
    t = t.reshape([*t.shape, *[1] * (len(order) - t.ndim)])
    t = t.permute([order.index(axis) for axis in axes] + [place for place, axis in enumerate(order) if axis not in axes])
    shape, at = [], 0
    for dim in dims_of(pattern):
        shape.append(math.prod(t.shape[at : at + len(dim)]))
        at += len(dim)
    return t.reshape(shape).contiguous()


def spans(pattern: str, sizes: Mapping[str, int], ranges: Ranges) -> tuple[slice, ...]:
    """Where the ranges lie along each dim; of a dim of several axes, those before one that is cut must be a single place.

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
    """The ranges, split until each part is one rectangle of the tensor: "E (G I) X" cut along I is two, for gates and for ups."""
    cut = {axis for axis, (start, stop) in ranges.items() if (start, stop) != (0, sizes[axis])}
    outer = [axis for dim in dims_of(pattern) for place, axis in enumerate(dim) if cut & set(dim[place + 1 :])]
    whole = {axis: ranges.get(axis, (0, sizes[axis])) for axis in axes_of(pattern)}
    for places in itertools.product(*(range(*whole[axis]) for axis in outer)):
        yield whole | {axis: (place, place + 1) for axis, place in zip(outer, places, strict=True)}


def sizes_of(config: MoEConfig) -> dict[str, int]:
    """The size of every axis."""
    shared, latent, zero = config.shared, config.latent, config.zero_experts
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
        "1": 1,
        "2": 2,
        "T": 2,
        "P": 16,
    }


def patterns_of(config: MoEConfig) -> dict[Path, str]:
    """The pattern of every tensor of MoEWeights."""
    rows = "I G" if config.gate_up_layout == "interleaved" else "G I"
    out_in = config.weight_layout == "out_in"
    of_quant = {("quant", f"{name}_{field}"): axes for name, axes in (("gate_up", f"E ({rows}) X"), ("down", "E X I")) for field in _TILED}
    return of_quant | {
        ("quant", "gate_up_input_scale"): "E",
        ("quant", "down_input_scale"): "E",
        ("gate_up",): f"E ({rows}) X" if out_in else f"E X ({rows})",
        ("down",): "E X I" if out_in else "E I X",
        ("gate_up_bias",): f"E ({rows})",
        ("down_bias",): "E X",
        ("expert_norm",): "E X",
        ("constants",): "Z H",
        ("input_norm",): "H",
        ("output_norm",): "H",
        ("router", "gate"): "C W",
        ("router", "bias"): "C",
        ("router", "correction_bias"): "D",
        ("router", "expert_scale"): "C",
        ("router", "expert_ids_of_token"): "V K",
        ("shared", "gate_up"): "(B N M) H",
        ("shared", "down"): "H (N M)",
        ("shared", "gate_up_bias"): "(B N M)",
        ("shared", "down_bias"): "H",
        ("shared", "gate"): "1 H",
        ("latent", "input"): "L H",
        ("latent", "output"): "H L",
        ("latent", "input_bias"): "L",
        ("latent", "output_bias"): "H",
        ("latent", "input_norm"): "L",
        ("latent", "output_norm"): "L",
    }
