"""The tiles of the kernels as data; moe_fn.kernels.triton.tiles chooses among them.

A row of a table is a tile by rows per expert (t = rows / experts): vLLM's tuned tables agree with these rows per tile
in 88 % of 911 rows for H100 and H200, and within a factor of two in 99 %. `python -m moe_fn.bench.sweep` times the
neighbours of a row.
"""

import functools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """A program computes rows x columns, inner elements of the sum at a time; stages of loads are under way at once."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Architecture:
    """Bytes of shared memory a program may use, processors that run programs, and whether the matrix unit reads shared
    memory.
    """

    shared_memory: int
    processors: int
    # wgmma, tcgen05: every stage holds a buffer; else one stage of the pipeline is in registers
    reads_shared: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "sm_75": Architecture(65_536, 40),
    "sm_80": Architecture(166_912, 108),
    "sm_89": Architecture(101_376, 128),  # as are sm_86 and sm_120
    "sm_90": Architecture(232_448, 132, reads_shared=True),
    "sm_100": Architecture(232_448, 148, reads_shared=True),
    "gfx942": Architecture(65_536, 304),
    "interpreter": Architecture(1 << 30, 1),  # a CPU: tiles are tiny, so that tests of small problems meet several
}

# architectures that start so, bytes of an element, rows per expert at most, tile: the first that holds
Row = tuple[str, int, float, Tile]

# Up-projection; columns count gate and up together. Under 16 rows per expert the weights' bytes are the time, and a
# tile of 16 rows wastes least; from 64 rows on wgmma computes. float32 is exact ("ieee"): no tensor cores on NVIDIA, so
# tiles that fit registers.
UP: tuple[Row, ...] = (
    ("sm", 2, 1, Tile(16, 64, 64, 4, 4)),
    ("sm", 2, 8, Tile(16, 128, 128, 4, 3)),
    ("sm", 2, 16, Tile(32, 128, 128, 4, 3)),
    ("sm", 2, 48, Tile(64, 128, 64, 4, 3)),
    ("sm", 2, 96, Tile(128, 128, 64, 8, 3)),
    ("sm", 2, math.inf, Tile(128, 256, 64, 8, 4)),
    ("sm", 4, 16, Tile(16, 64, 32, 4, 3)),
    ("sm", 4, 48, Tile(32, 64, 32, 4, 3)),
    ("sm", 4, math.inf, Tile(64, 64, 32, 8, 3)),
    ("gfx", 2, 8, Tile(16, 128, 128, 4, 2)),
    ("gfx", 2, 48, Tile(32, 128, 64, 4, 2)),
    ("gfx", 2, 96, Tile(64, 128, 64, 4, 2)),
    ("gfx", 2, math.inf, Tile(128, 128, 64, 8, 2)),
    ("gfx", 4, 16, Tile(16, 64, 64, 4, 2)),
    ("gfx", 4, math.inf, Tile(64, 64, 32, 4, 2)),
    ("interpreter", 2, math.inf, Tile(16, 32, 32, 1, 1)),
    ("interpreter", 4, math.inf, Tile(16, 32, 32, 1, 1)),
)

# Grouped products of rows: the down-projection and the gradient of x.
PRODUCT: tuple[Row, ...] = UP

# Gradient of the activated rows, with the activation's derivative in the epilogue: 256 columns spill (0.2 to 4.6 KB a
# thread).
DOWN_BACKWARD: tuple[Row, ...] = (
    ("sm", 2, 8, Tile(16, 64, 64, 4, 4)),
    ("sm", 2, 16, Tile(32, 64, 64, 4, 4)),
    ("sm", 2, 48, Tile(64, 128, 64, 4, 4)),
    ("sm", 2, math.inf, Tile(128, 128, 64, 8, 4)),
    ("sm", 4, 16, Tile(16, 64, 32, 4, 3)),
    ("sm", 4, math.inf, Tile(32, 64, 32, 4, 3)),
    ("gfx", 2, 16, Tile(16, 64, 64, 4, 2)),
    ("gfx", 2, 48, Tile(64, 64, 64, 4, 2)),
    ("gfx", 2, math.inf, Tile(128, 128, 64, 8, 2)),
    ("gfx", 4, 16, Tile(16, 64, 32, 4, 2)),
    ("gfx", 4, math.inf, Tile(64, 64, 32, 4, 2)),
    ("interpreter", 2, math.inf, Tile(16, 16, 32, 1, 1)),
    ("interpreter", 4, math.inf, Tile(16, 16, 32, 1, 1)),
)

# Gradients of the weights: the sum (inner) runs over the expert's rows.
OUTER: tuple[Row, ...] = (
    ("sm", 2, 16, Tile(128, 128, 16, 8, 3)),
    ("sm", 2, 48, Tile(128, 128, 32, 8, 3)),
    ("sm", 2, math.inf, Tile(128, 128, 64, 8, 3)),
    ("sm", 4, math.inf, Tile(64, 64, 16, 4, 3)),
    ("gfx", 2, 48, Tile(128, 128, 32, 8, 2)),
    ("gfx", 2, math.inf, Tile(128, 128, 64, 8, 2)),
    ("gfx", 4, math.inf, Tile(64, 64, 16, 4, 2)),
    ("interpreter", 2, math.inf, Tile(16, 32, 16, 1, 1)),
    ("interpreter", 4, math.inf, Tile(16, 32, 16, 1, 1)),
)

# Few rows, many experts: no matrix unit. 26 KB a processor have to be under way to keep an H200's memory busy, 32 or 64
# KB a program are; the longer side of a tile is the one along which weights are neighbours. The third column is top_k
# at most: rows is how many of a token's choices are under way together (down only).
DECODE_UP: tuple[Row, ...] = (
    ("sm", 2, math.inf, Tile(1, 16, 512, 4, 3)),
    ("sm", 4, math.inf, Tile(1, 16, 256, 4, 3)),
    ("gfx", 2, math.inf, Tile(1, 16, 512, 4, 2)),
    ("gfx", 4, math.inf, Tile(1, 16, 256, 4, 2)),
    ("interpreter", 2, math.inf, Tile(4, 16, 32, 1, 1)),
    ("interpreter", 4, math.inf, Tile(4, 16, 32, 1, 1)),
)
DECODE_UP_IN_OUT: tuple[Row, ...] = (
    ("sm", 2, math.inf, Tile(1, 128, 64, 4, 3)),
    ("sm", 4, math.inf, Tile(1, 128, 32, 4, 3)),
    ("gfx", 2, math.inf, Tile(1, 128, 64, 4, 2)),
    ("gfx", 4, math.inf, Tile(1, 128, 32, 4, 2)),
    ("interpreter", 2, math.inf, Tile(4, 16, 32, 1, 1)),
    ("interpreter", 4, math.inf, Tile(4, 16, 32, 1, 1)),
)
DECODE_DOWN: tuple[Row, ...] = (
    ("sm", 2, 2, Tile(2, 16, 256, 4, 3)),
    ("sm_100", 2, 4, Tile(4, 8, 128, 4, 4)),  # 256 deep and with eight warps, it spills 8 bytes a thread there
    ("sm", 2, 4, Tile(4, 8, 256, 8, 3)),
    ("sm_100", 2, math.inf, Tile(8, 4, 256, 4, 3)),
    ("sm", 2, math.inf, Tile(8, 4, 256, 8, 3)),
    ("sm", 4, 2, Tile(2, 16, 128, 4, 3)),
    ("sm", 4, 4, Tile(4, 8, 128, 8, 3)),
    ("sm", 4, math.inf, Tile(8, 4, 128, 8, 3)),
    ("gfx", 2, 4, Tile(4, 8, 256, 8, 2)),
    ("gfx", 2, math.inf, Tile(8, 4, 256, 8, 2)),
    ("gfx", 4, 4, Tile(4, 8, 128, 8, 2)),
    ("gfx", 4, math.inf, Tile(8, 4, 128, 8, 2)),
    ("interpreter", 2, math.inf, Tile(4, 16, 32, 1, 1)),
    ("interpreter", 4, math.inf, Tile(4, 16, 32, 1, 1)),
)
DECODE_DOWN_IN_OUT: tuple[Row, ...] = (
    ("sm", 2, 2, Tile(2, 64, 64, 4, 3)),
    ("sm", 2, 4, Tile(4, 64, 32, 4, 3)),
    ("sm", 2, math.inf, Tile(8, 64, 16, 4, 3)),
    ("sm", 4, 2, Tile(2, 64, 32, 4, 3)),
    ("sm_100", 4, 4, Tile(4, 32, 16, 4, 3)),
    ("sm", 4, 4, Tile(4, 64, 16, 4, 3)),
    ("sm", 4, math.inf, Tile(8, 32, 16, 4, 3)),
    ("gfx", 2, 4, Tile(4, 64, 32, 4, 2)),
    ("gfx", 2, math.inf, Tile(8, 64, 16, 4, 2)),
    ("gfx", 4, 4, Tile(4, 64, 16, 4, 2)),
    ("gfx", 4, math.inf, Tile(8, 32, 16, 4, 2)),
    ("interpreter", 2, math.inf, Tile(4, 16, 32, 1, 1)),
    ("interpreter", 4, math.inf, Tile(4, 16, 32, 1, 1)),
)

TABLES: dict[str, tuple[Row, ...]] = {
    "up": UP,
    "product": PRODUCT,
    "down_backward": DOWN_BACKWARD,
    "outer": OUTER,
    "decode_up": DECODE_UP,
    "decode_up_in_out": DECODE_UP_IN_OUT,
    "decode_down": DECODE_DOWN,
    "decode_down_in_out": DECODE_DOWN_IN_OUT,
}


@functools.cache
def rows_of(kind: str, dtype_bytes: int, arch: str) -> tuple[tuple[float, Tile], ...]:
    """(rows per expert at most, tile) of a kind. Asked at every launch."""
    return rows_that_hold(TABLES[kind], dtype_bytes, arch)


def rows_that_hold(table: tuple[Row, ...], dtype_bytes: int, arch: str) -> tuple[tuple[float, Tile], ...]:
    """(rows per expert at most, tile) of a table for elements and an architecture, rising: of two rows with one border
    the first holds.
    """
    found: dict[float, Tile] = {}
    for start, width, most, tile in table:
        if arch.startswith(start) and width == dtype_bytes:
            found.setdefault(most, tile)
    return tuple(found.items())
