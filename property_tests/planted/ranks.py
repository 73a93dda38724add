"""Planted bugs of what runs on several ranks.

Each must break "sharded equals unsharded" in its case (`CASE_OF_BUG`), and must not make any rank hang.
"""

import dataclasses
from typing import Any

import torch
from ranks.cases import EP, TP, Case

from moe_fn.layer import compose
from moe_fn.ops import collectives
from moe_fn.parallel import adapters, dispatch, sharding
from planted.bugs import PlantedBug, after, instead

LAW = "sharded_equals_unsharded"
replace = dataclasses.replace


def _first_row_everywhere(rows: Any, a: Any, *rest: Any) -> Any:
    return rows if a is None else rows * 0 + rows[:1]


def _one_place_too_many(rank_of_row: Any, starts: Any, capacity: int) -> Any:
    padded = torch.cat([starts, starts.new_zeros(1)])
    own_place, goes = torch.arange(len(rank_of_row)) - padded[rank_of_row], rank_of_row < len(starts)
    fits = goes & (own_place <= capacity)
    return torch.where(fits, rank_of_row * capacity + own_place, len(starts) * capacity), (goes & ~fits).sum()


def _with_constants(used: Any, parallel: Any, weights: Any) -> Any:
    return replace(used, constants=weights.constants)


RANK_BUGS = (
    PlantedBug(LAW, "outputs are not summed over tp", collectives.sum_over_ranks, instead(lambda x, group: x)),
    PlantedBug(LAW, "gradients of copies are not summed", collectives.copy_to_ranks, instead(lambda x, group: x)),
    PlantedBug(LAW, "no slice has the bias of down", sharding.shard_weights,
    after(lambda w, *a: replace(w, down_bias=None))),
    PlantedBug(LAW, "every expert has place 0 on its rank", dispatch.places_of_experts,
    after(lambda p, *a: (p[0], p[1].clamp(min=0) * 0))),
    PlantedBug(LAW, "weighted results are scaled by 1.01", dispatch._of_slots, after(lambda y, *a: y * 1.01)),
    PlantedBug(LAW, "gathered rows are in reverse order", dispatch.padded, after(lambda rows, *a: rows.flip(0))),
    PlantedBug(LAW, "rows of the sequence are joined in reverse order", collectives.join_rows,
    after(lambda rows, *a: rows.flip(0))),
    PlantedBug(LAW, "every received row is the first one", dispatch.unpacked, after(_first_row_everywhere)),
    PlantedBug(LAW, "blocks have one place", dispatch._capacity, after(lambda capacity, *a: 1)),
    PlantedBug(LAW, "a slot beyond the capacity gets the next rank's result", dispatch._places_in_blocks,
    instead(_one_place_too_many)),
    PlantedBug(LAW, "blocks have one place more than the capacity", dispatch._capacity,
    after(lambda capacity, *a: capacity + 1)),
    PlantedBug(LAW, "gradients of adapters are not summed", adapters.summed_over, instead(lambda *a: [])),
    PlantedBug(LAW, "rows have the adapter of the previous row", dispatch._ids_and_adapters,
    after(lambda p, *a: (p[0], p[1].roll(1)))),
    PlantedBug(LAW, "gradients of constants are not summed", compose._used_by_each, after(_with_constants)),
    PlantedBug(LAW, "adapter ids are too large by one", compose._no_expert_as_zero,
    after(lambda r, *a: replace(r, adapter_ids=r.adapter_ids + 1))),
)  # fmt: skip
_CASES = (
    Case(((TP, 2),), {"dispatch": "replicated"}),
    Case(((TP, 2),), {"dispatch": "replicated"}),
    Case(((TP, 2),), {"dispatch": "replicated"}),
    Case(((EP, 2),), {"dispatch": "all_to_all"}),
    Case(((EP, 2),), {"dispatch": "all_to_all"}),
    Case(((EP, 2),), {"dispatch": "all_gather"}),
    Case(((TP, 2),), {"sequence_parallel": True, "dispatch": "all_gather"}),
    Case(((EP, 2),), {"dispatch": "all_to_all"}, "int8"),
    Case(((EP, 2),), {"dispatch": "all_to_all_static", "max_tokens": 5}),
    Case(((EP, 2),), {"dispatch": "all_to_all_static", "max_tokens": 5, "capacity": 2}),
    Case(((EP, 2),), {"dispatch": "all_to_all_static", "max_tokens": 5, "capacity": 2}),
    Case(((TP, 2),), {"dispatch": "replicated"}, "lora"),
    Case(((EP, 2),), {"dispatch": "all_gather"}, "lora"),
    Case(((TP, 2),), {"sequence_parallel": True, "dispatch": "all_to_all"}, "constants, groups of choices"),
    Case(((TP, 2),), {"sequence_parallel": True, "dispatch": "all_to_all"}, "lora"),
)
CASE_OF_BUG = {bug.what: case for bug, case in zip(RANK_BUGS, _CASES, strict=True)}
