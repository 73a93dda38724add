"""Records of slots sorted by expert, and of the expert of each row tile; `metadata` computes them from expert ids."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SortedSlots:
    """The permutation that sorts slots by expert."""

    slot_of_row: Tensor  # [R] int32
    row_of_slot: Tensor  # [R] int32, -1 for slots without an expert
    starts: Tensor  # [E + 1] int32
    top_k: int

    @property
    def begins(self) -> Tensor:
        """[E]: the first row of each expert."""
        return self.starts.narrow(0, 0, self.starts.shape[0] - 1)

    @property
    def ends(self) -> Tensor:
        """[E]: the end (exclusive) of each expert's rows."""
        return self.starts.narrow(0, 1, self.starts.shape[0] - 1)


@dataclass(frozen=True)
class TileMap:
    """The expert and the first row of each tile of `rows` rows; unused tiles come last."""

    expert_of_tile: Tensor  # [tiles] int32, -1: unused
    first_row_of_tile: Tensor  # [tiles] int32, -1: unused
    rows: int


def max_tiles(rows: int, num_groups: int, tile_rows: int) -> int:
    """Upper bound of the number of tiles for `rows` rows of `num_groups` groups: each group may have one partly filled
    tile, and there are at most as many tiles as rows.

    >>> max_tiles(100, 8, 16), max_tiles(3, 8, 16), max_tiles(0, 8, 16)
    (14, 3, 0)
    """
    return min(rows, rows // tile_rows + num_groups)


def tiles_of_groups(starts: Tensor, ends: Tensor, rows_upper_bound: int, tile_rows: int) -> TileMap:
    """The tile map of groups with the rows starts[g] .. ends[g] ([G] integers), at most rows_upper_bound in total."""
    num_tiles = (ends - starts + (tile_rows - 1)).clamp(min=0) // tile_rows
    ends_of_tiles = num_tiles.cumsum(0)
    tiles = torch.arange(max_tiles(rows_upper_bound, starts.shape[0], tile_rows), device=starts.device)
    group = torch.searchsorted(ends_of_tiles, tiles, right=True)
    used, some = group < starts.shape[0], group.clamp(max=max(starts.shape[0] - 1, 0))
    before = ends_of_tiles.index_select(0, some) - num_tiles.index_select(0, some)
    first = starts.index_select(0, some) + (tiles - before) * tile_rows
    return TileMap(
        torch.where(used, group, -1).to(torch.int32), torch.where(used, first, -1).to(torch.int32), tile_rows
    )
