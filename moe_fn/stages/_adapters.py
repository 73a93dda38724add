"""What low-rank adapters add to the products of experts: rows sorted anew by adapter and expert, and two grouped
products each.

No loop over adapters and no look at values: the graph is the same whoever has which adapter. With one adapter that
everybody has, nothing is sorted: rows lie by expert already.
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
    """Rows in the order of (adapter, expert), those without either last."""

    product: Product
    ends_of_pairs: Tensor  # [L * E] int32: where the rows of adapter l and expert e end, at l * E + e
    ends_of_adapters: Tensor  # [L] int32
    row_of_place: Tensor | None  # [R]; None: the rows lie so
    place_of_row: Tensor | None


def sort_by_adapter(config: MoEConfig, dispatched: Dispatched) -> ByAdapter | None:
    """Where the rows of each adapter and expert are; None without config.lora."""
    if config.lora is None:
        return None
    ends, adapters = dispatched.expert_ends, dispatched.adapter_of_row
    product = functools.partial(GROUPED[backend_of(config, dispatched.rows)].matmul, invariant=config.batch_invariant)
    num_experts, num_adapters = config.num_experts, config.lora.num_adapters
    if adapters is None:
        if num_adapters > 1:
            raise ValueError(
                f"experts: adapter_of_row is None; expected ids, for config.lora has {num_adapters} adapters"
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
    """out + B A rows, each row with the matrices of its adapter and expert: rows [R, in], out [R, out], in float32 or
    wider.

    Rows without an adapter get nothing. A's result is rounded to the dtype of rows. Without adapters on this product,
    out as it is.
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
    """matrices [L, E or 1, out, in] times the rows of each adapter and expert, or of each adapter."""
    of_all = matrices.shape[0] * matrices.shape[1] != by.ends_of_pairs.shape[0]
    return by.product(rows, matrices.flatten(0, 1), by.ends_of_adapters if of_all else by.ends_of_pairs, True)
