"""Patterns of named axes for weights in memory and in files: "E (G I) X" is [E, G * I, X], all gates before all ups, as
in einops.
"""

import itertools
import math
from collections.abc import Mapping

Dims = tuple[tuple[str, ...], ...]  # axes of each dim
ANY = -1  # size of an axis that the config does not determine


def dims_of(pattern: str) -> Dims:
    """Returns the axes of each dim of a pattern.

    >>> dims_of("E (G I) X")
    (('E',), ('G', 'I'), ('X',))
    """
    dims: list[tuple[str, ...]] = []
    inside = False
    for token in pattern.replace("(", " ( ").replace(")", " ) ").split():
        if token in "()":
            inside = token == "("
            dims += [()] if inside else []
        elif inside:
            dims[-1] += (token,)
        else:
            dims.append((token,))
    return tuple(dims)


def pattern_of(dims: Dims) -> str:
    """The inverse of dims_of.

    >>> pattern_of((("E",), ("I", "G")))
    'E (I G)'
    """
    return " ".join(dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in dims)


def axes_of(pattern: str) -> tuple[str, ...]:
    """Returns all axes of a pattern, in order.

    >>> axes_of("E (G I) X")
    ('E', 'G', 'I', 'X')
    """
    return tuple(itertools.chain.from_iterable(dims_of(pattern)))


def shape_of(pattern: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the shape of a tensor with this pattern; ANY for dims with an axis of any size.

    >>> shape_of("E (G I) X", {"E": 8, "G": 2, "I": 3, "X": 4})
    (8, 6, 4)
    """
    return tuple(size_of(dim, sizes) for dim in dims_of(pattern))


def size_of(dim: tuple[str, ...], sizes: Mapping[str, int]) -> int:
    """Returns the size of a dim with these axes.

    >>> size_of(("G", "I"), {"G": 2, "I": 3}), size_of(("V",), {"V": ANY})
    (6, -1)
    """
    return ANY if any(sizes[axis] == ANY for axis in dim) else math.prod(sizes[axis] for axis in dim)
