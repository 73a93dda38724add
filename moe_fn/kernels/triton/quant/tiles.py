"""Tiles of the products with weights in codes, by rows per expert, as moe_fn.kernels.triton.tiles has those of float
weights.
"""

import functools
import math
from dataclasses import replace

from moe_fn.kernels.triton.tile_tables import Row, Tile, rows_that_hold
from moe_fn.kernels.triton.tiles import width_for_grid

LEAST_STEP = 32  # products of 8-bit codes take 32 at a time

# Weights that are decoded. They are the left operand, [columns, inner] in registers, so 16 rows take wgmma; a tile of
# 256 columns would need all registers for the codes. 128 inputs of 128 columns are 8 KB of 4-bit codes, so four stages
# have what two have in bfloat16.
DECODED: tuple[Row, ...] = (
    ("sm", 2, 1, Tile(16, 64, 128, 4, 4)),
    ("sm_100", 2, 8, Tile(16, 128, 128, 8, 4)),  # with four warps, fp8 spills 24 bytes a thread there
    ("sm", 2, 8, Tile(16, 128, 128, 4, 4)),
    ("sm", 2, 16, Tile(32, 128, 128, 4, 3)),
    ("sm", 2, 48, Tile(64, 128, 64, 4, 3)),
    ("sm_80", 2, math.inf, Tile(128, 128, 32, 8, 4)),  # 64 deep, fp8 in software spills
    ("sm", 2, math.inf, Tile(128, 128, 64, 8, 3)),
    ("sm", 4, 16, Tile(16, 64, 32, 4, 3)),
    ("sm", 4, math.inf, Tile(32, 64, 32, 4, 3)),
    ("gfx", 2, 8, Tile(16, 128, 64, 4, 2)),
    ("gfx", 2, 48, Tile(32, 128, 64, 4, 2)),
    ("gfx", 2, math.inf, Tile(64, 128, 64, 4, 2)),
    ("gfx", 4, 16, Tile(16, 64, 32, 4, 2)),
    ("gfx", 4, math.inf, Tile(32, 64, 32, 4, 2)),
    ("interpreter", 2, math.inf, Tile(16, 32, 32, 1, 1)),
    ("interpreter", 4, math.inf, Tile(16, 32, 32, 1, 1)),
)
# Codes times codes. Below 64 rows the weights are the left operand: wgmma takes 64 rows of it at least, and fp8 without
# it is multiplied as float16. 256 columns of gate and up are 128 activated ones, a group of codes, which the kernel can
# make by itself.
CODED_UP: tuple[Row, ...] = (
    ("sm", 1, 1, Tile(16, 64, 128, 4, 4)),
    ("sm", 1, 8, Tile(16, 128, 128, 4, 4)),
    ("sm", 1, 16, Tile(32, 128, 128, 4, 4)),
    ("sm_80", 1, math.inf, Tile(64, 128, 64, 4, 3)),
    ("sm_89", 1, math.inf, Tile(64, 128, 64, 4, 3)),
    ("sm_75", 1, math.inf, Tile(64, 128, 64, 4, 2)),
    ("sm", 1, math.inf, Tile(64, 256, 128, 8, 3)),
    ("gfx", 1, 8, Tile(16, 128, 64, 4, 2)),
    ("gfx", 1, math.inf, Tile(64, 128, 64, 4, 2)),
    ("interpreter", 1, math.inf, Tile(16, 64, 32, 1, 1)),
)
CODED_PRODUCT: tuple[Row, ...] = (
    *(row for row in CODED_UP if row[3].columns < 256),
    ("sm", 1, math.inf, Tile(64, 128, 128, 4, 4)),
)
TABLES: dict[str, tuple[Row, ...]] = {
    "decoded_up": DECODED,
    "decoded_product": DECODED,
    "coded_up": CODED_UP,
    "coded_product": CODED_PRODUCT,
}


def swaps(tile: Tile, width: int) -> bool:
    """Whether the weights are the left operand of the product; width: bytes of an element of the left side, 1 for
    codes.

    Not in float32: Triton 3.7 takes tf32 for it on sm_100 from 64 rows of a left operand on, whatever precision it is
    asked for.
    """
    return width == 2 or (width == 1 and tile.rows < 64)


@functools.cache
def rows_of_coded(kind: str, width: int, arch: str) -> tuple[tuple[float, Tile], ...]:
    """(rows per expert at most, tile) of a kind; width: bytes of an element of the left side, 1 for codes.

    Asked at every launch.
    """
    return rows_that_hold(TABLES[kind], width, arch)


def plainer(tile: Tile, width: int) -> Tile:
    """For rows of codes that 16 bytes do not divide: loaded one by one, each by a pointer, a wide tile spills up to 800
    bytes a thread.
    """
    return replace(tile, columns=min(tile.columns, 32 if width == 4 else 64), inner=LEAST_STEP, stages=2)


def coded_tile(
    kind: str, rows: int, experts: int, columns: int, row_bytes: int, shared: tuple[int, ...], width: int, arch: str
) -> Tile:  # fmt: skip
    """The tile of a product of rows [R, K] with `columns` outputs, whose rows of codes have row_bytes.

    shared: how many inputs have one scale, of weights and of the left side; width: bytes of an element of the left
    side.
    """
    tile = next(tile for most, tile in rows_of_coded(kind, width, arch) if rows / max(experts, 1) <= most)
    tile = tile if row_bytes % 16 == 0 else plainer(tile, width)
    inner = tile.inner
    for size in shared:
        inner = fitting_step(inner, size, whole=width == 1)
    return replace(tile, columns=width_for_grid(tile, rows, experts, columns, 64, arch), inner=inner)


def fitting_step(inner: int, shared: int, whole: bool = False) -> int:
    """inner, or less, so that `shared` inputs are whole steps, or (not of codes: `whole`) a step is made of such; 0 if
    neither can be.

    >>> [fitting_step(128, shared) for shared in (128, 64, 32, 16, 384, 96, 48)]
    [128, 128, 128, 128, 128, 32, 0]
    >>> [fitting_step(128, shared, whole=True) for shared in (128, 64, 32, 16, 384, 96, 48)]
    [128, 64, 32, 0, 128, 32, 0]
    """
    if inner == 0 or shared % inner == 0 or (inner % shared == 0 and not whole):
        return inner
    step = shared & -shared
    return step if step >= LEAST_STEP else 0
