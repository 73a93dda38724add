"""A kernel to compile ahead of time: types of its arguments, values of its constants."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_fn.kernels.triton.tile_tables import Tile


@dataclass(frozen=True)
class Case:
    """A kernel with types of its arguments ("*bf16", "i32") and values of its constants; tile: the constants that
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
    # arguments that may not be multiples of 16: pointers into a tensor, counts of tiles
    unaligned: frozenset[str] = frozenset()
    fusion: bool = True  # whether multiplications and additions may be fused
    bound: int = 1 << 30  # upper bound of the shared memory in bytes by the heuristics
