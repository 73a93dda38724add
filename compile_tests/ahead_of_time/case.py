"""A kernel to be compiled ahead of time: types for its arguments, values for its constants."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_fn.kernels.triton.tile_tables import Tile


@dataclass(frozen=True)
class Case:
    """A kernel with types for its arguments ("*bf16", "i32") and values for its constants; tile: for those that
    heuristics choose.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    tile: Tile | None = None
    dtype: str = "bf16"
    product: bool = False  # has a tl.dot of its dtype
    # arguments that need not be multiples of 16: pointers into a tensor, counts of tiles
    unaligned: frozenset[str] = frozenset()
    fusion: bool = True  # of multiplications with additions
    bound: int = 1 << 30  # bytes of shared memory that the heuristics expect at most
