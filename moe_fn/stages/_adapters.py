"""LoRA in the experts' products: rows are sorted by (adapter, expert), then two grouped products per adapted matrix.

There is no loop over adapters and no dependence on values: one graph serves every assignment of adapters to tokens.
With one adapter for all tokens rows are not sorted again: dispatch has sorted them by expert.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_fn.backends import backend_of
from moe_fn.config import MoEConfig
from moe_fn.numerics import accumulation_dtype
from moe_fn.ops.grouped_matmul import GROUPED
from moe_fn.ops.rows import count_up_to, ends_of_keys, gather_rows, sort_slots
from moe_fn.records import Dispatched, LoRAWeights

Product = Callable[[Tensor, Tensor, Tensor, bool], Tensor]  # GroupedOps.matmul


@dataclass(frozen=True)
class ByAdapter:
    """The order of rows by (adapter, expert); rows without an adapter or without an expert come last."""

    product: Product
    ends_of_pairs: Tensor  # [L * E] int32: end of the rows of adapter l and expert e, at l * E + e
    ends_of_adapters: Tensor  # [L] int32
    row_of_place: Tensor | None  # [R]; None: rows are in this order already
    place_of_row: Tensor | None


def sort_by_adapter(config: MoEConfig, dispatched: Dispatched) -> ByAdapter | None:
    """Returns the order of rows by adapter and expert; None without config.lora."""
    if config.lora is None:
        return None
    ends, adapters = dispatched.expert_ends, dispatched.adapter_of_row
    product = functools.partial(GROUPED[backend_of(config, dispatched.rows)].matmul, invariant=config.batch_invariant)
    num_experts, num_adapters = config.num_experts, config.lora.num_adapters
    if adapters is None:
        if num_adapters > 1:
            raise ValueError(
                f"experts: adapter_of_row is None; expected ids, because config.lora has {num_adapters} adapters"
            )
        return ByAdapter(product, ends, ends.narrow(0, num_experts - 1, 1), None, None)
    rows, pairs = torch.arange(adapters.shape[0], device=ends.device), num_adapters * num_experts
    expert_of_row = count_up_to(ends, rows.to(ends.dtype))
    adapters = adapters.to(torch.int64)
    known = (adapters >= 0) & (adapters < num_adapters) & (expert_of_row < num_experts)
    pair_of_row = torch.where(known, adapters * num_experts + expert_of_row, pairs)
    pair_of_place, row_of_place, place_of_row = sort_slots(pair_of_row)
    ends_of_pairs = ends_of_keys(pair_of_place, pairs).to(torch.int32)
    ends_of_adapters = ends_of_pairs.unflatten(0, (num_adapters, num_experts)).select(1, -1)
    return ByAdapter(product, ends_of_pairs, ends_of_adapters, row_of_place, place_of_row)


def add_adapters(
    by: ByAdapter | None, lora: LoRAWeights | None, product: Literal["gate_up", "down"], rows: Tensor, out: Tensor
) -> Tensor:
    """Returns out + B A rows in float32 or wider, with A and B of each row's adapter and expert: rows [R, in], out
    [R, out].

    Rows without an adapter are not changed. The product with A is rounded to the dtype of rows. Returns out itself if
    this product has no adapters.
    """
    if by is None or lora is None:
        return out
    a, b = (lora.gate_up_a, lora.gate_up_b) if product == "gate_up" else (lora.down_a, lora.down_b)
    if a is None or b is None:
        return out
    if by.row_of_place is not None and by.place_of_row is not None:
        rows = gather_rows(rows, by.row_of_place, by.place_of_row, 1)
    added = _product(by, _product(by, rows, a), b)
    if by.row_of_place is not None and by.place_of_row is not None:
        added = gather_rows(added, by.place_of_row, by.row_of_place, 1)
    wide = accumulation_dtype(out.dtype)
    return out.to(wide) + added.to(wide)


def _product(by: ByAdapter, rows: Tensor, matrices: Tensor) -> Tensor:
    """Grouped product of rows with matrices [L, E or 1, out, in]: by adapter and expert, or by adapter where E is 1."""
    shared = matrices.shape[0] * matrices.shape[1] != by.ends_of_pairs.shape[0]
    return by.product(rows, matrices.flatten(0, 1), by.ends_of_adapters if shared else by.ends_of_pairs, True)
