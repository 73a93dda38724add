"""dispatch: from tokens to rows sorted by expert."""

import torch
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.ops.arithmetic import ARITHMETIC
from moe_fn.ops.rows import ends_of_keys, gather_rows, sort_slots
from moe_fn.records import Dispatched, Routing
from moe_fn.stages._checks import check_dispatch


def dispatch(config: MoEConfig, x: Tensor, routing: Routing) -> Dispatched:
    """Copies each token to one row per slot and sorts the rows by expert.

        rows[r] = x[slot_of_row[r] // top_k]

    x [tokens, width], routing.expert_ids [tokens, top_k] -> rows [tokens * top_k, width]. Slots with an id < 0
    or >= num_experts have no expert: their rows come last, from expert_ends[-1] on. With weight_on="input" rows are
    w * x, rounded once.

    Laws
        slot_of_row is a permutation of the slots.
        The expert of a row never decreases.
        Rows of one expert keep token order.
        expert_ends is the running count of rows per expert.
        Slots of no expert come last.

    The sort is stable, so that back-ends sum rows in the same order and agree in the last bit.

    >>> config = MoEConfig(num_experts=3, top_k=1, hidden_size=1, intermediate_size=1)
    >>> routing = Routing(expert_ids=torch.tensor([[2], [0], [-1], [0]]), weights=torch.ones(4, 1))
    >>> d = dispatch(config, torch.tensor([[10.0], [20.0], [30.0], [40.0]]), routing)
    >>> d.rows.flatten().tolist(), d.expert_ends.tolist()
    ([20.0, 40.0, 10.0, 30.0], [2, 2, 3])
    """
    return _dispatch(config, x, check_dispatch(config, x, routing))


def _dispatch(config: MoEConfig, x: Tensor, routing: Routing) -> Dispatched:
    ids = routing.expert_ids.flatten()
    num_experts = config.num_experts
    expert_of_slot = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    expert_of_row, slot_of_row, row_of_slot = sort_slots(expert_of_slot)
    expert_ends = ends_of_keys(expert_of_row, num_experts).to(torch.int32)
    rows = gather_rows(x, slot_of_row, row_of_slot, config.top_k)
    if config.router.weight_on == "input":
        rows = weighted(config, rows, gather_rows(routing.weights.reshape(-1, 1), slot_of_row, row_of_slot, 1))
    adapters = routing.adapter_ids
    return Dispatched(
        rows=rows,
        expert_ends=expert_ends,
        slot_of_row=slot_of_row,
        row_of_slot=row_of_slot,
        adapter_of_row=None if adapters is None else adapters.index_select(0, slot_of_row // config.top_k),
    )


def weighted(config: MoEConfig, x: Tensor, weights: Tensor) -> Tensor:
    """Returns w * x rounded once, for weight_on="input": x [..., width], weights [..., 1]."""
    return (x.to(weights.dtype) * ARITHMETIC[config.batch_invariant].expand_rows(weights, x.shape[-1])).to(x.dtype)
