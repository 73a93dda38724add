"""Sorted slots for the tests of the Triton kernels, computed by plain torch, without the kernels under test."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from moe_fn.config import ActivationConfig
from moe_fn.config.activation import PRESETS
from moe_fn.kernels.triton.slots import SortedSlots, TileMap
from moe_fn.kernels.triton.tiles import Tile

NAN = float("nan")
ACTIVATIONS = [*PRESETS.values(), ActivationConfig(function="situ", gate_cap=3.0, up_cap=2.0, limit=1.0)]
ACTIVATIONS += [
    ActivationConfig(function="gelu", limit=0.5, up_offset=1.0),
    ActivationConfig(function="relu", limit=0.5, limit_at="output"),
]
# bfloat16 is tested on GPUs: the interpreter multiplies its bits as integers
DTYPES = st.sampled_from([torch.float32, torch.float16])
TILES = st.sampled_from([Tile(16, 32, 16, 1, 1), Tile(16, 16, 32, 1, 1), Tile(32, 64, 16, 1, 1)])
SIZES = st.sampled_from([1, 7, 16, 24, 33, 48])


@dataclasses.dataclass(frozen=True)
class Rows:
    """A drawn routing: ids [T, k], its sorted slots, and the tokens and experts that no kernel may read."""

    ids: Tensor
    num_experts: int
    slots: SortedSlots
    seed: int

    @property
    def live(self) -> int:
        """The number of rows that have an expert; they come first."""
        return int(self.slots.starts[-1])

    @property
    def expert_of_row(self) -> Tensor:
        return self.ids.flatten()[self.slots.slot_of_row.long()]

    @property
    def token_of_row(self) -> Tensor:
        return self.slots.slot_of_row.long() // self.slots.top_k

    @property
    def has_expert(self) -> Tensor:
        return (self.ids >= 0) & (self.ids < self.num_experts)

    def tile_map(self, tile_rows: int) -> TileMap:
        """The tiles of each expert's rows, followed by unused ones up to the bound that the host computes."""
        starts, num_rows = self.slots.starts.tolist(), self.ids.numel()
        tiles = [(e, first) for e in range(self.num_experts) for first in range(starts[e], starts[e + 1], tile_rows)]
        tiles += [(-1, -1)] * (min(num_rows, num_rows // tile_rows + self.num_experts) - len(tiles))
        table = torch.tensor(tiles, dtype=torch.int32).reshape(-1, 2)
        return TileMap(table[:, 0].contiguous(), table[:, 1].contiguous(), tile_rows)

    def tensors(self, dtype: torch.dtype) -> Callable[..., Tensor]:
        """Returns a function that makes random tensors of a dtype, equal for equal seeds."""
        generator = torch.Generator().manual_seed(self.seed)

        def make(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype)

        return make

    def by_token(self, values: Tensor) -> Tensor:
        """Sets the values of tokens without an expert to NaN."""
        return torch.where(self.has_expert.any(1)[:, None], values, NAN).to(values.dtype)

    def by_expert(self, values: Tensor) -> Tensor:
        """Sets the values of experts without a token to NaN."""
        used = torch.zeros(self.num_experts, dtype=torch.bool)
        used[self.ids[self.has_expert]] = True
        return torch.where(used.view(-1, *[1] * (values.ndim - 1)), values, NAN).to(values.dtype)

    def by_row(self, values: Tensor) -> Tensor:
        """Sets the rows of no expert to NaN."""
        return torch.where((torch.arange(values.shape[0]) < self.live)[:, None], values, NAN).to(values.dtype)

    def by_slot(self, values: Tensor) -> Tensor:
        """Sets the values of slots of no expert to NaN."""
        return torch.where(self.has_expert, values, NAN)


@st.composite
def routings(draw: st.DrawFn) -> Rows:
    """Draws any routing: no tokens, ids of no expert, experts without rows, all rows for one expert."""
    num_experts, top_k, tokens = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([0, 1, 2, 5, 9, 21])),
    )
    seed = draw(st.integers(0, 9999))
    generator = torch.Generator().manual_seed(seed)
    low, high = draw(
        st.sampled_from([(-1, num_experts), (0, num_experts), (0, 1), (num_experts - 1, num_experts + 2), (-2, 0)])
    )
    ids = torch.randint(low, high, (tokens, top_k), generator=generator)
    flat = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts).flatten()
    slot_of_row = flat.argsort(stable=True)
    row_of_slot = torch.empty_like(slot_of_row).scatter_(0, slot_of_row, torch.arange(flat.numel()))
    row_of_slot = torch.where(flat < num_experts, row_of_slot, -1)
    starts = torch.cat(
        [torch.zeros(1, dtype=torch.int64), torch.bincount(flat, minlength=num_experts + 1)[:num_experts].cumsum(0)]
    )
    return Rows(ids, num_experts, SortedSlots(slot_of_row.int(), row_of_slot.int(), starts.int(), top_k), seed)


def in_layout(weight: Tensor, out_in: bool) -> Tensor:
    """Returns the weight [E, K, N], stored in memory as [E, N, K] if out_in."""
    return weight.mT.contiguous().mT if out_in else weight


def double(*tensors: Any) -> list[Any]:
    return [t if t is None else t.double() for t in tensors]
