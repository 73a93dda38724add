"""shard_weights: what of a layer's weights one rank has; and back."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_fn.balance import physical_weights
from moe_fn.checking import check_shapes
from moe_fn.config import MoEConfig, as_activation
from moe_fn.config.sharing import ranks_of_experts
from moe_fn.parallel.adapters import join_adapters, shard_adapters
from moe_fn.parallel.cutting import joined, slice_of
from moe_fn.parallel.places import placement_of_weights, without_placement
from moe_fn.records import WEIGHT_PATHS, MoEWeights, SharedWeights, leaves_of_weights

_FIRST_SLICE_ONLY = (("down_bias",), ("shared", "down_bias"))


def shard_weights(config: MoEConfig, weights: MoEWeights) -> MoEWeights:
    """This rank's part of a layer's weights, by config.parallel: its experts, its slice of each, its slice of the shared experts.

        gate_up [E, gate_up, Hx] -> [own E, gate_up / slices, Hx];  down [E, Hx, I] -> [own E, Hx, I / slices]

    Biases of down (and of shared.down) are on the first slice alone: the others' would be added once a rank. Everything else every rank
    has. Of LoRA adapters it has its experts and slices too (`moe_fn.parallel.adapters` says of which). With num_physical the placement
    beside the router says which experts are copied to which slots (for inference: a copy's gradient is its own). Slices of a packed
    gate_up are of both halves. Tensors that are cut are copies, the rest are the same tensors.
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
    mine = parallel.ep.rank if parallel.ep else 0
    experts = torch.tensor([e for e, rank in enumerate(ranks_of_experts(config, parallel)) if rank == mine], device=weights.gate_up.device)
    slices, number = parallel.slices
    out, inner = (1, 2) if config.weight_layout == "out_in" else (2, 1)
    gated, packed = as_activation(config.activation).gated, config.gate_up_layout == "packed"

    def of_experts(t: Tensor | None) -> Tensor | None:
        return t if t is None or len(experts) == len(weights.gate_up) else t.index_select(0, experts)

    def columns(t: Tensor | None, dim: int, halves: int) -> Tensor | None:
        return None if t is None else slice_of(t, dim, halves, slices, number)

    halves = 2 if gated and packed else 1
    return dataclasses.replace(
        weights,
        gate_up=columns(of_experts(weights.gate_up), out, halves),  # type: ignore[arg-type]
        down=columns(of_experts(weights.down), inner, 1),  # type: ignore[arg-type]
        gate_up_bias=columns(of_experts(weights.gate_up_bias), 1, halves),
        down_bias=of_experts(weights.down_bias) if number == 0 else None,
        expert_norm=of_experts(weights.expert_norm),
        lora=shard_adapters(config, weights.lora, experts),
        shared=_shard_shared(config, weights.shared),
    )


def _shard_shared(config: MoEConfig, shared: SharedWeights | None) -> SharedWeights | None:
    parallel = config.parallel
    if shared is None or config.shared is None or parallel is None or parallel.tp is None or parallel.shared == "replicated":
        return shared
    size, rank = parallel.tp.size, parallel.tp.rank
    gated = as_activation(config.shared.activation).gated
    parts = (2 if gated else 1) * config.shared.count  # each expert is cut by itself: the router may weigh it

    def cut(t: Tensor | None, dim: int, parts: int) -> Tensor | None:
        return None if t is None else slice_of(t, dim, parts, size, rank)

    return dataclasses.replace(
        shared,
        gate_up=cut(shared.gate_up, 0, parts),  # type: ignore[arg-type]
        down=cut(shared.down, 1, config.shared.count),  # type: ignore[arg-type]
        gate_up_bias=cut(shared.gate_up_bias, 0, parts),
        down_bias=shared.down_bias if rank == 0 else None,
    )


def join_weights(configs: Sequence[MoEConfig], shards: Sequence[MoEWeights]) -> MoEWeights:
    """All weights again, from the shards of every rank that has a part of its own, in any order: the inverse of shard_weights.

    configs and shards are of the same ranks. Ranks that have the same part (dp) may be left out.
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
    out, inner = (1, 2) if first.weight_layout == "out_in" else (2, 1)
    halves = 2 if as_activation(first.activation).gated and first.gate_up_layout == "packed" else 1
    order = torch.tensor(sorted(range(first.num_experts), key=lambda expert: (owners[expert], expert)), device=shards[0].gate_up.device)

    def of_experts(name: str, dim: int | None, parts: int) -> Tensor | None:
        rows = []
        for rank in range(ranks):
            pieces = [getattr(found[(rank, number)][1], name) for number in (range(slices) if dim is not None else (0,))]
            if pieces[0] is None:
                return None
            rows.append(pieces[0] if dim is None else joined(pieces, dim, parts))
        return torch.cat(rows).index_select(0, order.argsort())

    zero = found[(0, 0)][1]
    return dataclasses.replace(
        zero,
        gate_up=of_experts("gate_up", out, halves),  # type: ignore[arg-type]
        down=of_experts("down", inner, 1),  # type: ignore[arg-type]
        gate_up_bias=of_experts("gate_up_bias", 1, halves),
        down_bias=of_experts("down_bias", None, 1),
        expert_norm=of_experts("expert_norm", None, 1),
        lora=join_adapters(first, [[found[(rank, number)][1].lora for number in range(slices)] for rank in range(ranks)], order.argsort()),
        shared=_join_shared(first, [found[(0, number)][1].shared for number in range(slices)]),
    )


def _check_shards(configs: Sequence[MoEConfig], shards: Sequence[MoEWeights]) -> None:
    """As many configs as shards, of one layer cut in one way, with the same weights in each."""
    if len(configs) != len(shards):
        raise ValueError(f"join_weights: {len(configs)} configs and {len(shards)} shards; expected as many")
    if not configs:
        raise ValueError("join_weights: no configs; expected those of all ranks")
    for number, (config, shard) in enumerate(zip(configs, shards, strict=True)):
        check_shapes(f"join_weights, shard {number}", config, shard)
        if _cut(config) != _cut(configs[0]):
            raise ValueError(f"join_weights: configs 0 and {number} are of different layers, or cut them in different ways")
        for path, here, there in zip(WEIGHT_PATHS, leaves_of_weights(shards[0]), leaves_of_weights(shard), strict=True):
            if (here is None) != (there is None) and path not in _FIRST_SLICE_ONLY:
                raise ValueError(f"join_weights: shards 0 and {number} differ in whether they have {'.'.join(path)}")


def _cut(config: MoEConfig) -> tuple[object, ...]:
    """What ranks of a layer have in common."""
    parallel = config.parallel
    whole = dataclasses.replace(config, parallel=None)
    return (
        (whole,) if parallel is None else (whole, parallel.ep and parallel.ep.size, parallel.slices[0], parallel.placement, parallel.shared)
    )


def _join_shared(config: MoEConfig, parts: Sequence[SharedWeights | None]) -> SharedWeights | None:
    parallel, shared = config.parallel, parts[0]
    if shared is None or config.shared is None or parallel is None or parallel.tp is None or parallel.shared == "replicated":
        return shared
    pieces = [part for part in parts[: parallel.tp.size] if part is not None]
    halves = (2 if as_activation(config.shared.activation).gated else 1) * config.shared.count
    bias = None if shared.gate_up_bias is None else joined([p.gate_up_bias for p in pieces if p.gate_up_bias is not None], 0, halves)
    return dataclasses.replace(
        shared,
        gate_up=joined([piece.gate_up for piece in pieces], 0, halves),
        down=joined([piece.down for piece in pieces], 1, config.shared.count),
        gate_up_bias=bias,
    )
