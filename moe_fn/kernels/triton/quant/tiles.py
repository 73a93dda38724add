"""Tables and choice of tiles for products with quantized weights; moe_fn.kernels.triton.tiles has those of floats."""

import functools
import math
from dataclasses import replace

from moe_fn.kernels.triton.tile_tables import Row, Tile, rows_that_hold
from moe_fn.kernels.triton.tiles import width_for_grid

LEAST_STEP = 32  # the matrix unit multiplies 32 8-bit codes at a time

# Weights decoded in the product. They are the left operand, [columns, inner] in registers, so wgmma works with 16 rows;
# a tile of 256 columns would need all registers for the codes. 128 inputs of 128 columns are 8 KB of 4-bit codes, so
# four stages have as many bytes as two in bfloat16.
DECODED: tuple[Row, ...] = (
    ("sm", 2, 1, Tile(16, 64, 128, 4, 4)),
    ("sm_100", 2, 8, Tile(16, 128, 128, 8, 4)),  # with four warps fp8 spills 24 bytes per thread
    ("sm", 2, 8, Tile(16, 128, 128, 4, 4)),
    ("sm", 2, 16, Tile(32, 128, 128, 4, 3)),
    ("sm", 2, 48, Tile(64, 128, 64, 4, 3)),
    ("sm_80", 2, math.inf, Tile(128, 128, 32, 8, 4)),  # with inner 64 fp8 decoded in software spills
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
# Codes times codes. Below 64 rows the weights are the left operand: wgmma needs at least 64 rows of it, and without
# wgmma fp8 is multiplied as float16. 256 columns of gate and up give 128 activated columns, a group of codes, which the
# kernel can quantize itself.
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
    """Whether the weights are the left operand of the product; width: bytes per element of the rows, 1 for codes.

    Not in float32: on sm_100 Triton 3.7 uses tf32 for left operands of at least 64 rows, for any requested precision.
    """
    return width == 2 or (width == 1 and tile.rows < 64)


@functools.cache
def rows_of_coded(kind: str, width: int, arch: str) -> tuple[tuple[float, Tile], ...]:
    """(maximum of rows per expert, tile) of a kind of kernel; width: bytes per element of the rows, 1 for codes.

    Cached, because every launch needs it.
    """
    return rows_that_hold(TABLES[kind], width, arch)


def plainer(tile: Tile, width: int) -> Tile:
    """A smaller tile for rows of codes that are not multiples of 16 bytes: codes are loaded one by one, each with a
    pointer, and a wide tile spills up to 800 bytes per thread.
    """
    return replace(tile, columns=min(tile.columns, 32 if width == 4 else 64), inner=LEAST_STEP, stages=2)


def coded_tile(
    kind: str, rows: int, experts: int, columns: int, row_bytes: int, shared: tuple[int, ...], width: int, arch: str
) -> Tile:  # fmt: skip
    """The tile of a product of rows [R, K] with `columns` outputs; a row of codes has row_bytes.

    shared: the numbers of inputs that share a scale, of weights and of rows; width: bytes per element of the rows.
    """
    tile = next(tile for most, tile in rows_of_coded(kind, width, arch) if rows / max(experts, 1) <= most)
    tile = tile if row_bytes % 16 == 0 else plainer(tile, width)
    inner = tile.inner
    for size in shared:
        inner = fitting_step(inner, size, whole=width == 1)
    return replace(tile, columns=width_for_grid(tile, rows, experts, columns, 64, arch), inner=inner)


def fitting_step(inner: int, shared: int, whole: bool = False) -> int:
    """The largest step up to `inner` such that `shared` inputs are a multiple of it, or it is a multiple of `shared`
    (unless `whole`, for codes); 0 without one.

    >>> [fitting_step(128, shared) for shared in (128, 64, 32, 16, 384, 96, 48)]
    [128, 128, 128, 128, 128, 32, 0]
    >>> [fitting_step(128, shared, whole=True) for shared in (128, 64, 32, 16, 384, 96, 48)]
    [128, 64, 32, 0, 128, 32, 0]
    """
    if inner == 0 or shared % inner == 0 or (inner % shared == 0 and not whole):
        return inner
    step = shared & -shared
    return step if step >= LEAST_STEP else 0
