# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Sorts slots by expert and maps row tiles to experts, without a host sync.

    slot s = token * top_k + choice  --slot_of_row / row_of_slot-->  row, sorted by expert and then by slot
    rows of expert e: starts[e] .. starts[e + 1];  slots without an expert (ids outside 0 .. E - 1) are the rows from
                                                   starts[E] on
    row tile t: rows from first_row_of_tile[t] on, of expert_of_tile[t] (-1: unused)

Counts use histograms and no atomics on global memory, and the sort is stable: the same ids give the same rows in every
run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fn.kernels.triton.slots import SortedSlots, TileMap, max_tiles
from moe_fn.kernels.triton.tiles import Tile

# Up to this number one program sorts all slots (55 compare-and-swap steps for 1024, 78 for 4096, each a pass through
# shared memory); above it three launches (2 us each in a CUDA graph) are not slower, because they sort blocks in
# parallel.
ONE_PROGRAM_SLOTS = 1024
BLOCK_SLOTS = 1024  # slots that one program of the three-kernel form sorts
SCAN_EXPERTS = 32  # columns of the counts that one program scans: 128 bytes of a row, a full memory transaction
SCAN_BLOCKS = 128  # rows that it scans at a time: 131,072 slots, so that a typical batch takes one step
MAP_TILES = 256  # tiles of a map that one program writes


def sort_slots(
    expert_ids: Tensor, num_experts: int, tile_rows: tuple[int, ...]
) -> tuple[SortedSlots, tuple[TileMap, ...]]:
    """Slots sorted by expert, and one tile map for each of tile_rows. expert_ids is [T, top_k] integers."""
    form = in_one_program if expert_ids.numel() <= ONE_PROGRAM_SLOTS else in_three_kernels
    return form(expert_ids, num_experts, tile_rows)


def sort_for_tiles(expert_ids: Tensor, num_experts: int, *tiles: Tile) -> tuple[SortedSlots, dict[int, TileMap]]:
    """sort_slots with one tile map for each height of the tiles."""
    heights = tuple(sorted({tile.rows for tile in tiles}))
    slots, maps = sort_slots(expert_ids, num_experts, heights)
    return slots, dict(zip(heights, maps, strict=True))


def in_one_program(
    expert_ids: Tensor, num_experts: int, tile_rows: tuple[int, ...]
) -> tuple[SortedSlots, tuple[TileMap, ...]]:
    """sort_slots in one launch: one program sorts, the others write the maps."""
    ids, slots, maps, tile_maps = _allocated(expert_ids, num_experts, tile_rows)
    if ids.numel() == 0:
        return slots, tile_maps
    block, experts = triton.next_power_of_2(max(ids.numel(), 16)), _bins(num_experts)
    _sort_kernel[(1 + _map_programs(ids.numel(), num_experts, tile_rows),)](
        ids, slots.slot_of_row, slots.row_of_slot, slots.starts, *maps, ids.numel(), num_experts,
        BLOCK=block, EXPERTS=experts, CHUNK=MAP_TILES, TILE_ROWS=tile_rows, num_warps=4 if block <= 512 else 8,
    )  # fmt: skip
    return slots, tile_maps


def in_three_kernels(
    expert_ids: Tensor, num_experts: int, tile_rows: tuple[int, ...], block: int = BLOCK_SLOTS
) -> tuple[SortedSlots, tuple[TileMap, ...]]:
    """sort_slots for any number of slots: counts for each block, their cumulative sums, then each block is placed."""
    ids, slots, maps, tile_maps = _allocated(expert_ids, num_experts, tile_rows)
    if ids.numel() == 0:
        return slots, tile_maps
    blocks, experts = triton.cdiv(ids.numel(), block), _bins(num_experts)
    counts = ids.new_empty((blocks, num_experts + 1), dtype=torch.int32)
    before, totals = torch.empty_like(counts), counts.new_empty(num_experts + 1)
    _count_kernel[(blocks,)](ids, counts, ids.numel(), num_experts, BLOCK=block, EXPERTS=experts, num_warps=4)
    _scan_kernel[(triton.cdiv(num_experts + 1, SCAN_EXPERTS),)](
        counts, before, totals, blocks, num_experts, BLOCKS=SCAN_BLOCKS, COLUMNS=SCAN_EXPERTS, num_warps=4
    )
    _place_kernel[(blocks + _map_programs(ids.numel(), num_experts, tile_rows),)](
        ids, before, totals, slots.slot_of_row, slots.row_of_slot, slots.starts, *maps, ids.numel(), num_experts,
        blocks,
        BLOCK=block, EXPERTS=experts, CHUNK=MAP_TILES, TILE_ROWS=tile_rows, num_warps=4 if block <= 512 else 8,
    )  # fmt: skip
    return slots, tile_maps


def _allocated(
    expert_ids: Tensor, num_experts: int, tile_rows: tuple[int, ...]
) -> tuple[Tensor, SortedSlots, tuple[Tensor, Tensor], tuple[TileMap, ...]]:
    """Flat ids and the allocated results; all maps are views of one pair of tensors, aligned to 4 elements (16
    bytes).
    """
    ids = expert_ids.reshape(-1)
    num_slots = ids.numel()
    lengths = [max_tiles(num_slots, num_experts, rows) for rows in tile_rows]
    firsts = [sum(_padded(length) for length in lengths[:i]) for i in range(len(lengths))]
    slot_of_row = ids.new_empty(num_slots, dtype=torch.int32)
    starts = (ids.new_empty if num_slots else ids.new_zeros)(num_experts + 1, dtype=torch.int32)
    slots = SortedSlots(slot_of_row, torch.empty_like(slot_of_row), starts, expert_ids.shape[1])
    expert, first_row = (ids.new_empty(sum(map(_padded, lengths)), dtype=torch.int32) for _ in range(2))
    maps = tuple(
        TileMap(expert.narrow(0, first, length), first_row.narrow(0, first, length), rows)
        for first, length, rows in zip(firsts, lengths, tile_rows, strict=True)
    )
    return ids.contiguous(), slots, (expert, first_row), maps


def _padded(length: int) -> int:
    return (length + 3) // 4 * 4


def _bins(num_experts: int) -> int:
    """The number of bins: one for each expert, one for slots without an expert, one for padding of a block."""
    bins: int = max(16, triton.next_power_of_2(num_experts + 2))
    return bins


def _map_programs(num_slots: int, num_experts: int, tile_rows: tuple[int, ...]) -> int:
    return sum(triton.cdiv(max_tiles(num_slots, num_experts, rows), MAP_TILES) for rows in tile_rows)


@triton.jit
def _bins_of_block(ids, first, R, E, BLOCK: tl.constexpr):
    """The expert of each slot of a block: E without an expert, E + 1 past the last slot."""
    slot = first + tl.arange(0, BLOCK)
    e = tl.load(ids + slot, mask=slot < R, other=0)
    e = tl.where((e >= 0) & (e < E), e, E).to(tl.int32)
    return tl.where(slot < R, e, E + 1)


@triton.jit
def _write_maps(
    counts,
    chunk,
    expert_of_tile,
    first_row_of_tile,
    R,
    E,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Writes chunk `chunk` of the concatenated maps. counts [EXPERTS] is 0 from E on."""
    offset = 0
    for m in tl.static_range(len(TILE_ROWS)):
        tiles = tl.minimum(R, R // TILE_ROWS[m] + E)
        chunks = tl.cdiv(tiles, CHUNK)
        if (chunk >= 0) & (chunk < chunks):
            t = chunk * CHUNK + tl.arange(0, CHUNK)
            _write_tiles(
                counts, t, tiles, expert_of_tile + offset, first_row_of_tile + offset, E, TILE_ROWS[m], EXPERTS
            )
        chunk -= chunks
        offset += (tiles + 3) // 4 * 4


@triton.jit
def _write_tiles(counts, t, tiles, expert_of_tile, first_row_of_tile, E, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Writes tiles t of one map. A tile's expert is the number of experts whose tiles end at or before it, found by
    bisection. The map is not filled with -1 first, so no barrier between two stores is needed.
    """
    num_tiles = (counts + (ROWS - 1)) // ROWS
    ends = tl.cumsum(num_tiles, 0)
    expert = tl.zeros_like(t)
    for i in tl.static_range(1, 20):
        if EXPERTS >> i > 0:
            expert += tl.where(tl.gather(ends, expert + ((EXPERTS >> i) - 1), 0) <= t, EXPERTS >> i, 0)
    used = expert < E
    row_of_tile_0 = tl.cumsum(counts, 0) - counts - (ends - num_tiles) * ROWS
    first_row = tl.gather(row_of_tile_0, tl.where(used, expert, 0), 0) + t * ROWS
    tl.store(expert_of_tile + t, tl.where(used, expert, -1), mask=t < tiles)
    tl.store(first_row_of_tile + t, tl.where(used, first_row, -1), mask=t < tiles)


@triton.jit
def _sort_kernel(
    ids, slot_of_row, row_of_slot, starts, expert_of_tile, first_row_of_tile, R, E,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """Program 0 sorts; each other program writes a chunk of a map from its own counts, which is faster than waiting."""
    e = _bins_of_block(ids, 0, R, E, BLOCK)
    column = tl.arange(0, EXPERTS)
    counts = tl.where(column < E, tl.histogram(e, EXPERTS), 0)
    if tl.program_id(0) == 0:
        tl.store(starts + column, tl.cumsum(counts, 0) - counts, mask=column <= E)
        row = tl.arange(0, BLOCK)
        key = tl.sort(e * BLOCK + row)  # keys are unique, so any sort is stable; padding comes last
        slot = key % BLOCK
        tl.store(slot_of_row + row, slot, mask=row < R)
        tl.store(row_of_slot + slot, tl.where(key // BLOCK < E, row, -1), mask=row < R)
    else:
        _write_maps(counts, tl.program_id(0) - 1, expert_of_tile, first_row_of_tile, R, E, EXPERTS, CHUNK, TILE_ROWS)


@triton.jit
def _count_kernel(ids, counts, R, E, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """counts[b, e]: slots of block b with expert e; column E counts those without an expert."""
    b = tl.program_id(0)
    column = tl.arange(0, EXPERTS)
    found = tl.histogram(_bins_of_block(ids, b * BLOCK, R, E, BLOCK), EXPERTS)
    tl.store(counts + b.to(tl.int64) * (E + 1) + column, found, mask=column <= E)


@triton.jit
def _scan_kernel(counts, before, totals, blocks, E, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """before[b, e]: slots with expert e in blocks before b; totals[e]: in all blocks. A program scans COLUMNS
    experts.
    """
    e = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, blocks, BLOCKS):
        b = first + tl.arange(0, BLOCKS)
        mask = (b < blocks)[:, None] & (e <= E)[None, :]
        place = b.to(tl.int64)[:, None] * (E + 1) + e[None, :]
        found = tl.load(counts + place, mask=mask, other=0)
        tl.store(before + place, total[None, :] + tl.cumsum(found, 0) - found, mask=mask)
        total += tl.sum(found, 0)
    tl.store(totals + e, total, mask=e <= E)


@triton.jit
def _place_kernel(
    ids, before, totals, slot_of_row, row_of_slot, starts, expert_of_tile, first_row_of_tile, R, E, blocks,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """A program sorts its block and stores each expert's run after those of earlier blocks; programs from `blocks` on
    write the maps.
    """
    b = tl.program_id(0)
    column = tl.arange(0, EXPERTS)
    counts = tl.load(totals + column, mask=column <= E, other=0)
    if b < blocks:
        start = tl.cumsum(counts, 0) - counts
        tl.store(starts + column, start, mask=(column <= E) & (b == 0))
        e = _bins_of_block(ids, b * BLOCK, R, E, BLOCK)
        place = tl.arange(0, BLOCK)
        key = tl.sort(e * BLOCK + place)
        expert = key // BLOCK
        slot = b * BLOCK + key % BLOCK
        here = tl.histogram(e, EXPERTS)
        earlier = tl.load(before + b.to(tl.int64) * (E + 1) + column, mask=column <= E, other=0)
        shift = start + earlier - (tl.cumsum(here, 0) - here)  # from the index in the sorted block to the row
        row = place + tl.gather(shift, expert, 0)
        tl.store(slot_of_row + row, slot, mask=slot < R)
        tl.store(row_of_slot + slot, tl.where(expert < E, row, -1), mask=slot < R)
    else:
        counts = tl.where(column < E, counts, 0)
        _write_maps(counts, b - blocks, expert_of_tile, first_row_of_tile, R, E, EXPERTS, CHUNK, TILE_ROWS)
