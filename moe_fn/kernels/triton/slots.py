"""Where rows lie: slots sorted by expert, and whose rows each tile holds. `metadata` makes these from ids."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SortedSlots:
    """The order of the slots by expert."""

    slot_of_row: Tensor  # [R] int32
    row_of_slot: Tensor  # [R] int32, -1 for slots of no expert
    starts: Tensor  # [E + 1] int32
    top_k: int

    @property
    def begins(self) -> Tensor:
        """[E]: the first row of each expert."""
        return self.starts.narrow(0, 0, self.starts.shape[0] - 1)

    @property
    def ends(self) -> Tensor:
        """[E]: the row after the last of each expert."""
        return self.starts.narrow(0, 1, self.starts.shape[0] - 1)


@dataclass(frozen=True)
class TileMap:
    """Whose rows each tile of `rows` rows holds; surplus tiles come last."""

    expert_of_tile: Tensor  # [tiles] int32, -1: surplus
    first_row_of_tile: Tensor  # [tiles] int32, -1: surplus
    rows: int


def max_tiles(rows: int, num_groups: int, tile_rows: int) -> int:
    """How many tiles `rows` rows of `num_groups` groups can take: a partly filled one for each group, and no more than
    rows.

    >>> max_tiles(100, 8, 16), max_tiles(3, 8, 16), max_tiles(0, 8, 16)
    (14, 3, 0)
    """
    return min(rows, rows // tile_rows + num_groups)


def tiles_of_groups(starts: Tensor, ends: Tensor, rows_upper_bound: int, tile_rows: int) -> TileMap:
    """The tile map of groups whose rows are starts[g] ..

    ends[g], [G] integers; together they have at most rows_upper_bound rows.
    """
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
