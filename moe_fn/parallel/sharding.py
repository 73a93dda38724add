"""Sharding of weights: shard_weights returns one rank's part of a layer's weights, join_weights is the inverse."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_fn.balance import physical_weights
from moe_fn.config import MoEConfig
from moe_fn.config.local import experts_of_rank, ranks_of_experts
from moe_fn.parallel.cutting import own_part, whole_of
from moe_fn.parallel.expert_ranks import placement_of_weights, without_placement
from moe_fn.records import WEIGHT_PATHS, MoEWeights, Path, leaves_of_weights, weights_of_leaves
from moe_fn.weights.check import check_shapes
from moe_fn.weights.spec import added_by_others


def shard_weights(config: MoEConfig, weights: MoEWeights) -> MoEWeights:
    """This rank's part of a layer's weights by config.parallel: its experts, its slice of each, its slice of the
    shared experts.

        gate_up [E, gate_up, Hx] -> [own E, gate_up / slices, Hx];  down [E, Hx, I] -> [own E, Hx, I / slices]

    Scales and zero points are cut like the codes that they scale. Biases of down (and of shared.down) are on the first
    slice only: the sum over tp would add them once per rank. All other weights are on every rank. LoRA adapters are cut
    by experts and slices (table in `moe_fn.parallel.adapters`). With num_physical, the placement in weights.router
    copies experts to slots (for inference: gradients of copies are not summed). Each slice of a packed gate_up has rows
    of both halves. Tensors that are cut are copies, the others are the same tensors.

    Raises ValueError where the config has no `parallel`, and for weights that do not fit it.

    Laws
        Joining undoes sharding.

    >>> from moe_fn import ParallelConfig, RankGroup
    >>> ranks = ParallelConfig(ep=RankGroup(name="0", size=2, rank=1))
    >>> config = MoEConfig(num_experts=3, top_k=1, hidden_size=4, intermediate_size=2, parallel=ranks)
    >>> shard_weights(config, MoEWeights(gate_up=torch.zeros(3, 4, 4), down=torch.zeros(3, 4, 2))).down.shape
    torch.Size([1, 4, 2])
    """
    if not isinstance(config, MoEConfig):
        raise ValueError(f"shard_weights: config is a {type(config).__name__}; expected MoEConfig")
    parallel = config.parallel
    if parallel is None:
        raise ValueError("shard_weights: config.parallel is None; expected a ParallelConfig")
    check_shapes("shard_weights", dataclasses.replace(config, parallel=None), without_placement(weights))
    if parallel.num_physical is not None:
        weights = physical_weights(weights, placement_of_weights(weights))
    experts = torch.tensor(experts_of_rank(config, parallel), device=weights.gate_up.device)
    others = added_by_others(config)

    def part(path: Path, t: Tensor | None) -> Tensor | None:
        return None if t is None or path in others else own_part(config, path, t, experts)

    return weights_of_leaves([part(path, t) for path, t in zip(WEIGHT_PATHS, leaves_of_weights(weights), strict=True)])


def join_weights(configs: Sequence[MoEConfig], shards: Sequence[MoEWeights]) -> MoEWeights:
    """All weights from the shards of all ranks, in any order: the inverse of shard_weights.

    configs[i] and shards[i] are of the same rank. Ranks with the same part (dp) may be left out.

    Raises ValueError where parts are missing, do not fit their configs, or are of different layers.
    """
    _check_shards(configs, shards)
    first = configs[0]
    found: dict[tuple[int, int], tuple[MoEConfig, MoEWeights]] = {}
    for config, shard in zip(configs, shards, strict=True):
        if config.parallel is None:
            raise ValueError("join_weights: config.parallel is None; expected a ParallelConfig")
        found[(config.parallel.ep.rank if config.parallel.ep else 0, config.parallel.slices[1])] = (config, shard)
    parallel = first.parallel
    if parallel is None:
        raise ValueError("join_weights: config.parallel is None; expected a ParallelConfig")
    if parallel.num_physical is not None:
        raise ValueError("join_weights: config.parallel.num_physical has copies of experts; expected None")
    ranks, slices = parallel.ep.size if parallel.ep else 1, parallel.slices[0]
    missing = [(rank, number) for rank in range(ranks) for number in range(slices) if (rank, number) not in found]
    if missing:
        raise ValueError(f"join_weights: no shard of (rank of ep, slice) {missing}; expected {ranks} x {slices}")
    owners = ranks_of_experts(first, parallel)
    order = torch.tensor(
        sorted(range(first.num_experts), key=lambda expert: (owners[expert], expert)), device=shards[0].gate_up.device
    )
    leaves = {
        place: dict(zip(WEIGHT_PATHS, leaves_of_weights(shard), strict=True)) for place, (_, shard) in found.items()
    }

    def whole(path: Path) -> Tensor | None:
        if leaves[(0, 0)][path] is None:
            return None
        return whole_of(first, path, lambda rank, number: leaves[(rank, number)][path], order.argsort())  # type: ignore[arg-type, return-value]

    return weights_of_leaves([whole(path) for path in WEIGHT_PATHS])


def _check_shards(configs: Sequence[MoEConfig], shards: Sequence[MoEWeights]) -> None:
    """Raises ValueError unless there are as many configs as shards, of one layer, cut alike, with the same weights."""
    if len(configs) != len(shards):
        raise ValueError(f"join_weights: {len(configs)} configs and {len(shards)} shards; expected equal numbers")
    if not configs:
        raise ValueError("join_weights: no configs; expected those of all ranks")
    seen: dict[Path, tuple[int, bool]] = {}
    for number, (config, shard) in enumerate(zip(configs, shards, strict=True)):
        check_shapes(f"join_weights, shard {number}", config, shard)
        if _cut(config) != _cut(configs[0]):
            raise ValueError(
                f"join_weights: configs 0 and {number} are of different layers, or cut them in different ways"
            )
        for path, leaf in zip(WEIGHT_PATHS, leaves_of_weights(shard), strict=True):
            if path in added_by_others(config):
                continue
            other, there = seen.setdefault(path, (number, leaf is not None))
            if there != (leaf is not None):
                raise ValueError(
                    f"join_weights: shards {other} and {number} differ in whether they have {'.'.join(path)}"
                )


def _cut(config: MoEConfig) -> tuple[object, ...]:
    """What configs of all ranks of a layer have in common."""
    parallel = config.parallel
    whole = dataclasses.replace(config, parallel=None)
    return (
        (whole,)
        if parallel is None
        else (whole, parallel.ep and parallel.ep.size, parallel.slices[0], parallel.placement, parallel.shared)
    )
