"""combine: the weighted sum of each token's rows."""

import torch
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.numerics import accumulation_dtype
from moe_fn.ops.arithmetic import ARITHMETIC
from moe_fn.ops.rows import gather_rows
from moe_fn.records import Dispatched, Routing
from moe_fn.stages._checks import check_combine


def combine(config: MoEConfig, rows: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
    """Sums the rows of each token, multiplied by their routing weights.

        y[t] = sum over j of  weights[t, j] * rows[row_of_slot[t * top_k + j]],  over slots that have an expert

    rows [R, width], routing.weights [tokens, top_k] float32 -> [tokens, width] in the dtype of rows. Multiplies and
    sums in float32, in the order of the slots, and rounds once. With weight_on="input" the sum is unweighted: dispatch
    has applied the weights.

    Laws
        Combine is linear in the routing weights.
        Slots of no expert contribute nothing, even NaN.
        Combine undoes dispatch.

    Source: semantics of TopKWeightAndReduce in vLLM's modular kernel, in its most precise variant.

    >>> config = MoEConfig(num_experts=2, top_k=2, hidden_size=1, intermediate_size=1)
    >>> order = torch.tensor([0, 1])
    >>> d = Dispatched(rows=torch.empty(2, 1), expert_ends=torch.tensor([1, 2], dtype=torch.int32), slot_of_row=order,
    ...     row_of_slot=order)
    >>> routing = Routing(expert_ids=torch.tensor([[0, 1]]), weights=torch.tensor([[0.25, 0.75]]))
    >>> combine(config, torch.tensor([[4.0], [8.0]]), d, routing)
    tensor([[7.]])
    """
    return _combine(config, rows, dispatched, check_combine(config, rows, dispatched, routing))


def _combine(config: MoEConfig, rows: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
    wide, arithmetic = accumulation_dtype(rows.dtype), ARITHMETIC[config.batch_invariant]
    slots = (
        gather_rows(rows, dispatched.row_of_slot, dispatched.slot_of_row, 1).unflatten(0, (-1, config.top_k)).to(wide)
    )
    ids = routing.expert_ids
    has_expert = ((ids >= 0) & (ids < config.num_experts)).unsqueeze(-1)
    slots = torch.where(has_expert, slots, 0)  # not a multiplication by 0: an unused row may hold NaN
    if config.router.weight_on == "output":
        slots = slots * arithmetic.expand_rows(
            torch.where(has_expert, routing.weights.to(wide).unsqueeze(-1), 0), slots.shape[-1]
        )
    return arithmetic.sum_dim(slots, 1).to(rows.dtype)
