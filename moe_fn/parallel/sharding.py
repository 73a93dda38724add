"""shard_weights: what of a layer's weights one rank has; and back."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_fn.balance import physical_weights
from moe_fn.config import MoEConfig, as_activation
from moe_fn.config.local import experts_of_rank, ranks_of_experts
from moe_fn.parallel.adapters import join_adapters, shard_adapters
from moe_fn.parallel.cutting import joined, slice_of
from moe_fn.parallel.expert_ranks import placement_of_weights, without_placement
from moe_fn.quant.tiles import halves_of
from moe_fn.records import WEIGHT_PATHS, MoEWeights, SharedWeights, leaves_of_weights, weights_of_leaves
from moe_fn.weights.check import check_shapes

FIRST_SLICE_ONLY = (("down_bias",), ("shared", "down_bias"))


def shard_weights(config: MoEConfig, weights: MoEWeights) -> MoEWeights:
    """This rank's part of a layer's weights, by config.parallel: its experts, its slice of each, its slice of the shared experts.

        gate_up [E, gate_up, Hx] -> [own E, gate_up / slices, Hx];  down [E, Hx, I] -> [own E, Hx, I / slices]

    Scales and zero points go with the codes that they scale. Biases of down (and of shared.down) are on the first slice alone: the others'
    would be added once a rank. Everything else every rank has. Of LoRA adapters it has its experts and slices too
    (`moe_fn.parallel.adapters` says of which). With num_physical the placement beside the router says which experts are copied to which
    slots (for inference: a copy's gradient is its own). Slices of a packed gate_up are of both halves. Tensors that are cut are copies, the
    rest are the same tensors.
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
    slices, number = parallel.slices
    cuts = _cuts(config)
    whole = len(experts) == len(weights.gate_up)

    def part(path: tuple[str, ...], t: Tensor | None) -> Tensor | None:
        if t is None or path not in cuts:
            return t
        own, cut = t if whole else t.index_select(0, experts), cuts[path]
        return own if cut is None else slice_of(own, *cut, slices, number)

    leaves = [part(path, t) for path, t in zip(WEIGHT_PATHS, leaves_of_weights(weights), strict=True)]
    mine_of_each = weights_of_leaves(leaves)
    down_bias = mine_of_each.down_bias if number == 0 else None
    lora = shard_adapters(config, weights.lora, experts)
    return dataclasses.replace(mine_of_each, down_bias=down_bias, lora=lora, shared=_shard_shared(config, weights.shared))


def _cuts(config: MoEConfig) -> dict[tuple[str, ...], tuple[int, int] | None]:
    """(dim, parts of it that are cut apart) in which slices of experts cut what has experts as its first dim; None: they do not."""
    out, inner = (1, 2) if config.weight_layout == "out_in" else (2, 1)
    halves = halves_of(config, "gate_up")
    cuts: dict[tuple[str, ...], tuple[int, int] | None] = {
        ("gate_up",): (out, halves),
        ("down",): (inner, 1),
        ("gate_up_bias",): (1, halves),
        ("down_bias",): None,
        ("expert_norm",): None,
    }
    if config.quant is not None:
        outputs, inputs = config.quant.tile
        for what in ("scale", "zero_point"):  # one of a whole matrix is everybody's
            cuts[("quant", f"gate_up_{what}")] = None if outputs is None else (1, halves)
            cuts[("quant", f"down_{what}")] = None if inputs is None else (2, 1)
        cuts |= {("quant", f"{name}_{what}"): None for name in ("gate_up", "down") for what in ("global_scale", "input_scale")}
    return cuts


def _shard_shared(config: MoEConfig, shared: SharedWeights | None) -> SharedWeights | None:
    if shared is None or config.shared is None or config.parallel is None:
        return shared
    size, rank = config.parallel.slices_of_shared
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
    order = torch.tensor(sorted(range(first.num_experts), key=lambda expert: (owners[expert], expert)), device=shards[0].gate_up.device)
    leaves = {place: dict(zip(WEIGHT_PATHS, leaves_of_weights(shard), strict=True)) for place, (_, shard) in found.items()}
    cuts = _cuts(first)

    def whole(path: tuple[str, ...]) -> Tensor | None:
        if path not in cuts or leaves[(0, 0)][path] is None:
            return leaves[(0, 0)][path]
        cut, rows = cuts[path], []
        for rank in range(ranks):
            pieces = [leaves[(rank, number)][path] for number in (range(slices) if cut is not None else (0,))]
            there = [piece for piece in pieces if piece is not None]
            rows.append(there[0] if cut is None else joined(there, *cut))
        return torch.cat(rows).index_select(0, order.argsort())

    all_ = weights_of_leaves([whole(path) for path in WEIGHT_PATHS])
    lora = join_adapters(first, [[found[(rank, number)][1].lora for number in range(slices)] for rank in range(ranks)], order.argsort())
    return dataclasses.replace(all_, lora=lora, shared=_join_shared(first, [found[(0, number)][1].shared for number in range(slices)]))


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
            if (here is None) != (there is None) and path not in FIRST_SLICE_ONLY:
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
