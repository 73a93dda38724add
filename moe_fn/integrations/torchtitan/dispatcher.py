"""torchtitan's LocalTokenDispatcher on moe_fn: dispatch of tokens to rows sorted by expert, and combine, on one
rank.
"""

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.integrations.torchtitan.experts import config_member
from moe_fn.records import Dispatched, Routing
from moe_fn.stages.combine import combine
from moe_fn.stages.dispatch import dispatch


@dataclass(frozen=True, kw_only=True)
class DispatchMetadata:
    """The arguments of combine_rows other than the rows; it has the fields of torchtitan's LocalDispatchMetadata."""

    routing: Routing
    expert_ends: Tensor
    slot_of_row: Tensor
    row_of_slot: Tensor

    @property
    def token_indices_experts_sorted_N(self) -> Tensor:
        """[R]: the token of each row."""
        return self.slot_of_row // self.routing.expert_ids.shape[1]

    @property
    def topk_scores_experts_sorted_N(self) -> Tensor:
        """[R]: the routing weight of each row."""
        return self.routing.weights.flatten().index_select(0, self.slot_of_row)


def dispatch_tokens(
    config: MoEConfig,
    x_TD: Tensor,
    topk_scores_TK: Tensor,
    topk_expert_ids_TK: Tensor,
    num_local_tokens_per_expert_E: Tensor,
) -> tuple[Tensor, Tensor, DispatchMetadata]:
    """LocalTokenDispatcher.dispatch as a function: returns (rows [T * K, D] sorted by expert, the counts unchanged,
    metadata).

    Rows of one expert are in the order of their tokens, as with torchtitan's stable argsort. combine_rows applies the
    routing weights.

    >>> import torch
    >>> config = MoEConfig(num_experts=2, top_k=2, hidden_size=1, intermediate_size=1)
    >>> ids, scores, counts = torch.tensor([[1, 0], [1, 0]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([2,
    ...     2])
    >>> rows, _, metadata = dispatch_tokens(config, torch.tensor([[10.0], [20.0]]), scores, ids, counts)
    >>> rows.flatten().tolist(), metadata.token_indices_experts_sorted_N.tolist()
    ([10.0, 20.0, 10.0, 20.0], [0, 1, 0, 1])
    >>> combine_rows(config, torch.tensor([[0.0], [0.0], [4.0], [4.0]]), metadata).flatten().tolist()
    [3.0, 2.0]
    """
    routing = Routing(expert_ids=topk_expert_ids_TK, weights=topk_scores_TK)
    d = dispatch(config, x_TD, routing)
    metadata = DispatchMetadata(
        routing=routing, expert_ends=d.expert_ends, slot_of_row=d.slot_of_row, row_of_slot=d.row_of_slot
    )
    return d.rows, num_local_tokens_per_expert_E, metadata


def combine_rows(config: MoEConfig, routed_output_RD: Tensor, metadata: DispatchMetadata) -> Tensor:
    """LocalTokenDispatcher.combine as a function: the weighted sum of each token's rows, [T * K, D] to [T, D].

    It is summed in float32 in the order of the choices and rounded once; torchtitan rounds each addend and sums in the
    dtype of the rows.
    """
    d = Dispatched(
        rows=routed_output_RD,
        expert_ends=metadata.expert_ends,
        slot_of_row=metadata.slot_of_row,
        row_of_slot=metadata.row_of_slot,
    )
    return combine(config, routed_output_RD, d, metadata.routing)


def config_of_dispatcher(dispatcher: Any) -> MoEConfig:
    """A config with num_experts and top_k of a dispatcher; other sizes are 1, because they are not read."""
    return MoEConfig(num_experts=dispatcher.num_experts, top_k=dispatcher.top_k, hidden_size=1, intermediate_size=1)


@functools.lru_cache
def dispatcher_class(base: Any) -> Any:
    """A subclass of torchtitan's LocalTokenDispatcher that dispatches and combines with moe_fn, and its Config.

    Raises ValueError for another base class: dispatchers of expert parallelism communicate and are not replaced.
    """
    if base.__name__ != "LocalTokenDispatcher":
        raise ValueError(f"dispatcher_class: got {base.__name__}; expected LocalTokenDispatcher itself")

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        self.moe_fn_config = config_of_dispatcher(self)

    def dispatch(
        self: Any,
        x_TD: Tensor,
        topk_scores_TK: Tensor,
        topk_expert_ids_TK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> tuple[Tensor, Tensor, DispatchMetadata]:
        return dispatch_tokens(
            self.moe_fn_config, x_TD, topk_scores_TK, topk_expert_ids_TK, num_local_tokens_per_expert_E
        )

    def combine(self: Any, routed_output_RD: Tensor, metadata: DispatchMetadata, x_TD: Tensor) -> Tensor:
        return combine_rows(self.moe_fn_config, routed_output_RD, metadata)

    members = {
        "__init__": init,
        "dispatch": dispatch,
        "combine": combine,
        "__module__": __name__,
        "__doc__": "Dispatch and combine with moe_fn.",
    }
    return type(f"MoeFn{base.__name__}", (base,), members | config_member(base))
