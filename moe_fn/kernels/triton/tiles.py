"""Chooses the tile of a Triton kernel: pure functions of static sizes, so that a graph has the same kernels in every
call.

The tiles of tile_tables are adapted to the sizes and the device: they are narrower for small matrices and small grids,
have half the step if only that divides the inner size, and have fewer stages if shared memory is small.
"""

import itertools
from dataclasses import replace

import torch

from moe_fn.kernels.triton.tile_tables import ARCHITECTURES, Tile, rows_of

__all__ = [
    "Tile",
    "architecture_of",
    "architecture_of_capability",
    "decode_down_tile",
    "decode_up_tile",
    "divisible",
    "down_backward_tile",
    "outer_tile",
    "product_tile",
    "rows_of_tiles",
    "shared_memory",
    "tiles_of",
    "up_tile",
    "width_for_grid",
]

LEAST_STEP = 64  # steps are not halved below this to avoid masks: masks cost less than half the bytes in flight


# Rows per expert that batch-invariant tiles are chosen for: tiles of 32 rows are near the best for thousands of tokens,
# and not the best for a single one.
ROWS_OF_ANY_BATCH = 16


def rows_of_tiles(rows: int, experts: int, invariant: bool) -> int:
    """The number of rows that tiles are chosen for.

    invariant: 16 rows per expert, so that any batch is multiplied with the same tiles.
    """
    return ROWS_OF_ANY_BATCH * experts if invariant else rows


def up_tile(rows: int, experts: int, inner: int, columns: int, dtype_bytes: int, arch: str) -> Tile:
    """The tile of the up-projection of rows [R, inner = H] to columns = 2I (gate and up together) or I."""
    return _fitted("up", rows, experts, inner, columns, dtype_bytes, arch)


def product_tile(rows: int, experts: int, inner: int, columns: int, dtype_bytes: int, arch: str) -> Tile:
    """The tile of a grouped product of rows [R, inner] with [experts, inner, columns]."""
    return _fitted("product", rows, experts, inner, columns, dtype_bytes, arch)


def down_backward_tile(rows: int, experts: int, inner: int, columns: int, dtype_bytes: int, arch: str) -> Tile:
    """The tile of the gradient of the activated rows: inner = H, columns = I."""
    return _fitted("down_backward", rows, experts, inner, columns, dtype_bytes, arch)


def outer_tile(rows: int, experts: int, left: int, right: int, dtype_bytes: int, arch: str) -> Tile:
    """The tile of left [R, left]^T @ right [R, right] for each expert: tile.rows of left, tile.columns of right,
    tile.inner rows of R per step.
    """
    tile = _row("outer", rows / max(experts, 1), dtype_bytes, arch)
    tile = tile if divisible(left, right) else _plainer(tile, dtype_bytes)
    tile = replace(tile, rows=min(tile.rows, _power_of_two(left)), columns=min(tile.columns, _power_of_two(right)))
    return _shallower(tile, dtype_bytes, arch)


def decode_up_tile(
    rows: int, experts: int, inner: int, columns: int, dtype_bytes: int, arch: str, in_out: bool = False
) -> Tile:  # fmt: skip
    """The tile of the up-projection slot by slot: columns of gate and up together by inner elements of H.

    in_out: weights are contiguous along columns.
    """
    return _of_decode(_row("decode_up_in_out" if in_out else "decode_up", 1, dtype_bytes, arch), inner, columns)


def decode_down_tile(
    rows: int, experts: int, inner: int, columns: int, dtype_bytes: int, arch: str, in_out: bool = False, top_k: int = 8
) -> Tile:  # fmt: skip
    """The tile of the down-projection token by token: tile.rows choices at once, columns of H by inner elements of
    I.
    """
    return _of_decode(_row("decode_down_in_out" if in_out else "decode_down", top_k, dtype_bytes, arch), inner, columns)


def tiles_of(kind: str, dtype_bytes: int, arch: str, odd: bool = False) -> frozenset[Tile]:
    """Every tile that a kind of kernel gets for matrices of at least 256 x 256; all are compiled ahead of time.

    odd: for sizes that are not multiples of 16-byte loads.
    """
    found: set[Tile] = set()
    for _, tile in rows_of(kind, dtype_bytes, arch):
        tile = _plainer(tile, dtype_bytes) if odd else tile
        if kind.startswith("decode"):
            found.add(tile)
        elif kind == "outer":
            found.add(_shallower(tile, dtype_bytes, arch))
        else:
            least = min(_least_columns(tile), tile.columns)
            widths = (tile.columns >> halvings for halvings in range(4) if tile.columns >> halvings >= least)
            steps = (tile.inner,) if odd else (tile.inner, tile.inner // 2 if tile.inner > LEAST_STEP else tile.inner)
            found |= {
                _shallower(replace(tile, columns=w, inner=i), dtype_bytes, arch)
                for w, i in itertools.product(widths, steps)
            }
    return frozenset(found)


def shared_memory(tile: Tile, dtype_bytes: int, arch: str) -> int:
    """Upper bound of the bytes of shared memory of a kernel with a dot: the pipeline's buffers, or the result when its
    layout is converted.
    """
    about = ARCHITECTURES[arch]
    buffers = tile.stages if about.reads_shared and tile.rows >= 64 and dtype_bytes == 2 else max(tile.stages - 1, 1)
    pipeline = buffers * (tile.rows + tile.columns) * tile.inner * dtype_bytes + 1024
    return max(pipeline, tile.rows * tile.columns * 4)


def architecture_of(device: torch.device) -> str:
    """The key in ARCHITECTURES for a device; for unlisted devices the nearest one with at most as much shared memory.

    >>> architecture_of(torch.device("cpu"))
    'interpreter'
    """
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    return architecture_of_capability(major, minor)


def architecture_of_capability(major: int, minor: int) -> str:
    """The key in ARCHITECTURES for a CUDA compute capability.

    >>> [architecture_of_capability(*capability) for capability in ((7, 5), (8, 0), (8, 6), (8, 7), (9, 0), (10, 3),
    ...     (12, 0))]
    ['sm_75', 'sm_80', 'sm_89', 'sm_80', 'sm_90', 'sm_100', 'sm_89']
    """
    if major in (9, 10):
        return f"sm_{major}0"
    if major == 8 and minor in (0, 7):
        return "sm_80"
    return "sm_89" if major >= 8 else "sm_75"


def _row(kind: str, number: float, dtype_bytes: int, arch: str) -> Tile:
    """The tile of the first row of the table that applies; `number` is rows per expert, or top_k for decode_down."""
    for most, tile in rows_of(kind, dtype_bytes, arch):
        if number <= most:
            return tile
    raise ValueError(
        f"tiles: elements of {dtype_bytes} bytes on {arch}; expected 2 or 4, on one of {', '.join(ARCHITECTURES)}"
    )


def _fitted(kind: str, rows: int, experts: int, inner: int, columns: int, dtype_bytes: int, arch: str) -> Tile:
    """A tile not wider or deeper than the matrices, narrow enough for two programs per multiprocessor, and within
    shared memory.
    """
    tile = _row(kind, rows / max(experts, 1), dtype_bytes, arch)
    tile = tile if divisible(inner, columns) else _plainer(tile, dtype_bytes)
    width = width_for_grid(tile, rows, experts, columns, _least_columns(tile), arch)
    return _shallower(replace(tile, columns=width, inner=_step(tile.inner, inner)), dtype_bytes, arch)


def width_for_grid(tile: Tile, rows: int, experts: int, columns: int, least: int, arch: str) -> int:
    """Columns of a tile: at most the matrix's, and halved, but not below `least`, until each multiprocessor has two
    programs.
    """
    width = min(tile.columns, _power_of_two(columns))
    rows_of_tiles = min(rows, experts) * _quotient(_quotient(rows, max(experts, 1)), tile.rows)
    while width > least and rows_of_tiles * _quotient(columns, width) < 2 * ARCHITECTURES[arch].processors:
        width //= 2
    return width


def divisible(inner: int, columns: int) -> bool:
    """Whether loads can have 16 bytes and bypass registers, in either layout; `columns` counts gate and up together."""
    return inner % 16 == 0 and columns % 32 == 0


def _plainer(tile: Tile, dtype_bytes: int) -> Tile:
    """A smaller tile for loads of single elements: each takes registers for a pointer of 8 bytes, and larger tiles
    spill up to 3 KB.

    Such loads are not asynchronous, so more stages have no effect.
    """
    warps = tile.warps if dtype_bytes == 2 else min(tile.warps, 4)
    return replace(
        tile, columns=min(tile.columns, 128 // dtype_bytes), inner=min(tile.inner, 32), warps=warps, stages=2
    )


def _least_columns(tile: Tile) -> int:
    """The minimum of columns when a tile is made narrower for the grid: loads of 32 columns are whole cache lines, and
    from 64 rows on the matrix unit needs larger tiles.
    """
    return 32 if tile.rows < 64 else 64


def _of_decode(tile: Tile, inner: int, columns: int) -> Tile:
    return replace(tile, columns=min(tile.columns, _power_of_two(columns)), inner=min(tile.inner, _power_of_two(inner)))


def _step(step: int, size: int) -> int:
    """The step, limited by the size; half of it if only the half divides the size, which avoids masks (64 for the 2880
    of gpt-oss).
    """
    step = min(step, _power_of_two(size))
    return step // 2 if step > LEAST_STEP and size % step != 0 and size % (step // 2) == 0 else step


def _shallower(tile: Tile, dtype_bytes: int, arch: str) -> Tile:
    """A tile that fits in shared memory: narrower if the result alone does not fit, then with fewer stages, then with
    smaller steps.
    """
    limit = ARCHITECTURES[arch].shared_memory
    while tile.rows * tile.columns * 4 > limit:
        tile = replace(tile, columns=tile.columns // 2)
    while tile.stages > 1 and shared_memory(tile, dtype_bytes, arch) > limit:
        tile = replace(tile, stages=tile.stages - 1)
    while tile.inner > 16 and shared_memory(tile, dtype_bytes, arch) > limit:
        tile = replace(tile, inner=tile.inner // 2)
    return tile


def _power_of_two(size: int) -> int:
    """The least power of two that is at least `size`, and at least 16, the minimum of the matrix unit."""
    return 1 << max(4, (size - 1).bit_length())


def _quotient(size: int, step: int) -> int:
    return -(-size // step)
