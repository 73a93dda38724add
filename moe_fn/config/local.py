"""The part of a layer on one rank: the sizes and ids of its experts, computed from the config."""

from typing import Any

from moe_fn.config.parallel import ParallelConfig
from moe_fn.config.parts import padding_experts


def own_fields(config: Any, parallel: ParallelConfig) -> dict[str, Any]:
    """Returns the fields of the MoEConfig of this rank's routed experts: their input width is hidden_size, without a
    latent space or shared experts, with a default router.

    Raises ValueError for options that the ranks cannot share.
    """
    _check(config, parallel)
    experts = _own_experts(config, parallel)
    # each slot is a token of its own
    by_slot = parallel.row.by_slot or config.router.weight_on == "input"
    top_k = 1 if by_slot else config.top_k
    return {
        "num_experts": experts,
        "top_k": top_k,
        "zero_experts": padding_experts(experts, top_k),
        "hidden_size": config.expert_hidden_size,
        "intermediate_size": config.intermediate_size // parallel.slices[0],
        **{name: getattr(config, name) for name in _SAME},
    }


def _own_experts(config: Any, parallel: ParallelConfig) -> int:
    """Returns the number of experts on this rank, or of expert slots. Builds no list over all experts: a config
    read from a file may have any size.
    """
    experts, ranks = parallel.num_physical or config.num_experts, parallel.ep.size if parallel.ep else 1
    used = len(set(parallel.placement)) if isinstance(parallel.placement, tuple) else min(experts, ranks)
    if used < ranks:
        raise ValueError(
            f"MoEConfig.parallel leaves {ranks - used} of {ranks} ranks of ep without an expert; expected one or more "
            "on each"
        )
    rank = parallel.ep.rank if parallel.ep else 0
    if isinstance(parallel.placement, tuple):
        return parallel.placement.count(rank)
    return experts // ranks + (rank < experts % ranks)


_SAME = ("activation", "gate_up_layout", "weight_layout", "expert_norm", "quant", "lora", "recompute", "backend")


def _check(config: Any, parallel: ParallelConfig) -> None:
    slices, _ = parallel.slices
    if config.chunk_tokens is not None or config.opaque:
        raise ValueError(
            "MoEConfig.parallel with chunk_tokens or opaque: expected neither, because ranks run collectives together"
        )
    if config.intermediate_size % slices:
        raise ValueError(
            f"MoEConfig.intermediate_size={config.intermediate_size}; expected a multiple of the {slices} slices of "
            "parallel"
        )
    if config.expert_norm is not None and slices > 1:
        raise ValueError(
            "MoEConfig.expert_norm with slices of experts: expected ep, because the norm needs an expert's whole output"
        )
    _check_tiles(config, slices)
    if isinstance(parallel.placement, tuple) and len(parallel.placement) != config.num_experts:
        raise ValueError(
            f"ParallelConfig.placement has {len(parallel.placement)} ranks; expected one for each of "
            f"{config.num_experts} experts"
        )
    if parallel.gather == "logits" and config.router.selection == "hash":
        raise ValueError(
            "ParallelConfig.gather='logits' with router.selection='hash': expected 'routing', because token ids "
            "are not gathered"
        )
    if parallel.num_physical is not None and parallel.num_physical < config.num_experts:
        raise ValueError(
            f"ParallelConfig.num_physical={parallel.num_physical}; expected at least the {config.num_experts} experts"
        )
    if parallel.gather == "logits" and config.router.capacity is not None:
        raise ValueError(
            "ParallelConfig.gather='logits' with router.capacity: expected 'routing', because it counts the tokens of "
            "one rank"
        )
    tp, shared = parallel.tp, config.shared
    if shared is not None and tp is not None and parallel.shared == "sharded" and shared.intermediate_size % tp.size:
        raise ValueError(
            f"SharedExpertsConfig.intermediate_size={shared.intermediate_size}; expected a multiple of tp's {tp.size}"
        )


def _check_tiles(config: Any, slices: int) -> None:
    """Raises ValueError where a slice of experts would split a scale's tile or a byte."""
    if config.quant is None or slices == 1:
        return
    width = config.intermediate_size // slices
    outputs, inputs = config.quant.tile
    for size, what in (
        (outputs, "outputs of gate_up per scale"),
        (inputs, "inputs of down per scale"),
        (config.quant.per_byte, "codes per byte"),
    ):
        if size is not None and width % size:
            raise ValueError(
                f"MoEConfig.intermediate_size={config.intermediate_size} in {slices} slices of {width}, with {size} "
                f"{what}: expected slices of a multiple of {size}, or ep"
            )


def ranks_of_experts(config: Any, parallel: ParallelConfig) -> tuple[int, ...]:
    """Returns the ep rank of each expert, or of each expert slot with num_physical."""
    experts, ranks = parallel.num_physical or config.num_experts, parallel.ep.size if parallel.ep else 1
    if isinstance(parallel.placement, tuple):
        return parallel.placement
    if parallel.placement == "round_robin":
        return tuple(expert % ranks for expert in range(experts))
    each, more = divmod(experts, ranks)
    return tuple(rank for rank in range(ranks) for _ in range(each + (rank < more)))


def experts_of_rank(config: Any, parallel: ParallelConfig) -> tuple[int, ...]:
    """Returns the ids of this rank's experts, in its order; with num_physical, of its expert slots."""
    mine = parallel.ep.rank if parallel.ep else 0
    return tuple(expert for expert, rank in enumerate(ranks_of_experts(config, parallel)) if rank == mine)
