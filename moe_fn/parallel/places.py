"""Where an expert is: pure arithmetic on ids, in the graph."""

import torch
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.config.sharing import ranks_of_experts


def places_of_experts(config: MoEConfig, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(rank, number among that rank's own) of the expert of each id, (ep's size, -1) for ids of no expert with weights."""
    parallel = config.parallel
    ranks = parallel.ep.size if parallel is not None and parallel.ep is not None else 1
    known = (ids >= 0) & (ids < config.num_experts)
    ids = torch.where(known, ids, 0)
    if parallel is not None and isinstance(parallel.placement, tuple):
        rank, own = _by_table(config, ids)
    elif parallel is not None and parallel.placement == "round_robin":
        rank, own = ids % ranks, ids // ranks
    else:
        each, more = config.num_experts // ranks, config.num_experts % ranks  # divmod does not trace where a config's number is symbolic
        first_small = more * (each + 1)  # experts on the ranks that have one more
        rank = torch.where(ids < first_small, ids // (each + 1), more + (ids - first_small) // max(each, 1))
        own = ids - rank * each - rank.clamp(max=more)
    return torch.where(known, rank, ranks), torch.where(known, own, -1)


def _by_table(config: MoEConfig, ids: Tensor) -> tuple[Tensor, Tensor]:
    """A table of the config's numbers: a constant of a compiled graph; in eager it is copied to the device in each call."""
    parallel = config.parallel
    ranks = ranks_of_experts(config, parallel) if parallel is not None else ()
    numbers = [ranks[:expert].count(rank) for expert, rank in enumerate(ranks)]
    rank, own = (torch.tensor(table, device=ids.device) for table in (ranks, numbers))
    return rank[ids], own[ids]
