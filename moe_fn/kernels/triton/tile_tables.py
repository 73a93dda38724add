"""Tables of tile sizes of the Triton kernels; moe_fn.kernels.triton.tiles chooses among them.

A row of a table has a tile for a range of rows per expert (t = rows / experts). vLLM's tuned tables agree with the rows
per tile in 88 % of 911 cases for H100 and H200, and within a factor of two in 99 %. `python -m moe_fn.bench.sweep`
times the neighbors of a row.
"""

import functools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """A program computes rows x columns outputs, `inner` elements of the sum per step; loads are pipelined in
    `stages`.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Architecture:
    """Bytes of shared memory per program, number of multiprocessors, and whether the matrix unit reads operands from
    shared memory.
    """

    shared_memory: int
    processors: int
    # wgmma, tcgen05: every stage has a buffer; otherwise one stage of the pipeline is in registers
    reads_shared: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "sm_75": Architecture(65_536, 40),
    "sm_80": Architecture(166_912, 108),
    "sm_89": Architecture(101_376, 128),  # also used for sm_86 and sm_120
    "sm_90": Architecture(232_448, 132, reads_shared=True),
    "sm_100": Architecture(232_448, 148, reads_shared=True),
    "gfx942": Architecture(65_536, 304),
    "interpreter": Architecture(1 << 30, 1),  # a CPU: tiles are tiny, so that small test problems have several
}

# (prefix of the architecture, bytes per element, maximum of rows per expert, tile); the first row that applies is used
Row = tuple[str, int, float, Tile]

# Up-projection; columns count gate and up together. Below 16 rows per expert the kernel is bound by the weights' bytes,
# and a tile of 16 rows wastes least; from 64 rows on wgmma is used. float32 is exact ("ieee"), without tensor cores on
# NVIDIA, so tiles must fit in registers.
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

# Gradient of the activated rows, with the activation's derivative in the epilogue: 256 columns spill (0.2 to 4.6 KB per
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

# Few rows and many experts: the matrix unit is not used. Saturating an H200's memory needs 26 KB in flight per
# multiprocessor; a program has 32 or 64 KB. The longer side of a tile is the one along which weights are contiguous.
# The third column is the maximum of top_k, and `rows` is the number of a token's choices in flight (down only).
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
    ("sm_100", 2, 4, Tile(4, 8, 128, 4, 4)),  # with inner 256 and eight warps it spills 8 bytes per thread
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
    """(maximum of rows per expert, tile) of a kind of kernel; cached, because every launch needs it."""
    return rows_that_hold(TABLES[kind], dtype_bytes, arch)


def rows_that_hold(table: tuple[Row, ...], dtype_bytes: int, arch: str) -> tuple[tuple[float, Tile], ...]:
    """(maximum of rows per expert, tile) of a table for an element size and an architecture, ascending; of two rows
    with the same maximum the first is used.
    """
    found: dict[float, Tile] = {}
    for start, width, most, tile in table:
        if arch.startswith(start) and width == dtype_bytes:
            found.setdefault(most, tile)
    return tuple(found.items())
