"""Maps expert ids to (rank, number on that rank): arithmetic on ids, inside the graph."""

import dataclasses

import torch
from torch import Tensor

from moe_fn.balance import Placement, physical_ids
from moe_fn.config import MoEConfig
from moe_fn.config.local import ranks_of_experts
from moe_fn.records import MoEWeights
from moe_fn.weights.spec import fields_without

# Weights that every rank of sp has and uses for its rows. The router runs before tokens are split into rows of sp.
WEIGHTS_OF_EACH = tuple(field for field in fields_without("E") if field != "router")


def placement_of_weights(weights: MoEWeights) -> Placement:
    """The placement of copies of experts, from the tensors in weights.router."""
    router = weights.router
    if (
        router is None
        or router.logical_of_physical is None
        or router.physical_of_logical is None
        or router.num_replicas is None
    ):
        raise ValueError(
            "weights.router has no placement; expected logical_of_physical, physical_of_logical and num_replicas"
        )
    return Placement(
        logical_of_physical=router.logical_of_physical,
        physical_of_logical=router.physical_of_logical,
        num_replicas=router.num_replicas,
    )


def without_placement(weights: MoEWeights) -> MoEWeights:
    """The weights without the tensors of the placement."""
    if not isinstance(weights, MoEWeights) or weights.router is None:
        return weights  # check_shapes reports a wrong type
    router = dataclasses.replace(weights.router, logical_of_physical=None, physical_of_logical=None, num_replicas=None)
    return dataclasses.replace(weights, router=router)


def places_of_experts(config: MoEConfig, weights: MoEWeights, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(rank, number among that rank's experts) of each id [T, K]; (ep's size, -1) for ids of no expert with weights.

    Where an expert has copies, a token takes copy (index of the token) mod (number of copies), so neighbouring tokens
    take turns.
    """
    parallel, num_experts = config.parallel, config.num_experts
    if parallel is not None and parallel.num_physical is not None:
        ids, num_experts = physical_ids(placement_of_weights(weights), ids), parallel.num_physical
    ranks = parallel.ep.size if parallel is not None and parallel.ep is not None else 1
    known = (ids >= 0) & (ids < num_experts)
    ids = torch.where(known, ids, 0)
    if parallel is not None and isinstance(parallel.placement, tuple):
        rank, own = _by_table(config, ids)
    elif parallel is not None and parallel.placement == "round_robin":
        rank, own = ids % ranks, ids // ranks
    else:
        # `//` and `%`: divmod does not trace where a number of the config is symbolic
        each, more = num_experts // ranks, num_experts % ranks
        first_small = more * (each + 1)  # experts on the ranks that have one more
        rank = torch.where(ids < first_small, ids // (each + 1), more + (ids - first_small) // max(each, 1))
        own = ids - rank * each - rank.clamp(max=more)
    return torch.where(known, rank, ranks), torch.where(known, own, -1)


def _by_table(config: MoEConfig, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Looks ids up in tables made of config.parallel.placement.

    The tables are constants of a compiled graph; in eager mode each call copies them to the device.
    """
    parallel = config.parallel
    ranks = ranks_of_experts(config, parallel) if parallel is not None else ()
    numbers = [ranks[:expert].count(rank) for expert, rank in enumerate(ranks)]
    rank, own = (torch.tensor(table, device=ids.device) for table in (ranks, numbers))
    return rank[ids], own[ids]
