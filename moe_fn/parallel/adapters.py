"""LoRA adapters of a layer that ranks share: what of them a rank has, and whose gradients are sums over ranks.

                 tensor parallel                      expert parallel
    gate_up_a    whole                                the rank's experts, or whole where experts share
    gate_up_b    slice of the outputs, as gate_up     likewise
    down_a       slice of the inputs, as down         likewise
    down_b       whole                                likewise

down_b (down_a a) is linear in the slices of a, so its parts add up in the sum over tp that is there anyway.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_fn.config import MoEConfig, ParallelConfig, RankGroup, as_activation
from moe_fn.ops import collectives
from moe_fn.parallel.cutting import joined, slice_of
from moe_fn.records import LoRAWeights

_WHOLE = ("gate_up_a", "down_b")  # on every rank of tp


def shard_adapters(config: MoEConfig, lora: LoRAWeights | None, experts: Tensor) -> LoRAWeights | None:
    """This rank's part: these experts, where they do not share, and its slice of each."""
    if lora is None or config.lora is None or config.parallel is None:
        return lora
    shares, (slices, number) = config.lora.shares, config.parallel.slices

    def own(name: str, t: Tensor) -> Tensor:
        t = t if shares(name) or len(experts) == t.shape[1] else t.index_select(1, experts)
        return t if name in _WHOLE else slice_of(t, *_cut_of(config, name), slices, number)

    return _each(lora, own)


def join_adapters(config: MoEConfig, shards: Sequence[Sequence[LoRAWeights | None]], places: Tensor) -> LoRAWeights | None:
    """The inverse of shard_adapters, of shards[rank of ep][slice]; places[e]: where expert e is when all ranks' lie end to end."""
    first, lora = shards[0][0], config.lora
    if first is None or lora is None:
        return first

    def whole(name: str, t: Tensor) -> Tensor:
        pieces = [[getattr(shard, name) for shard in of_rank] for of_rank in shards]
        rows = [of_rank[0] if name in _WHOLE else joined(of_rank, *_cut_of(config, name)) for of_rank in pieces]
        return rows[0] if lora.shares(name) else torch.cat(rows, 1).index_select(1, places)

    return _each(first, whole)


def adapters_of_each(config: MoEConfig, lora: LoRAWeights | None) -> LoRAWeights | None:
    """The adapters, whose gradients are summed over the ranks that have them too and use them for the same tokens."""
    if lora is None or config.parallel is None:
        return lora
    parallel = config.parallel

    def copied(name: str, t: Tensor) -> Tensor:
        for role in summed_over(config, parallel, name):
            t = collectives.copy_to_ranks(t, group_of_role(parallel, role))
        return t

    return _each(lora, copied)


def summed_over(config: MoEConfig, parallel: ParallelConfig, name: str) -> list[str]:
    """The groups of ranks that have the same tokens and this tensor, and use it each for its slice, or its own experts."""
    found = ["tp"] if parallel.tp is not None and name in _WHOLE else []
    if config.lora is None or not config.lora.shares(name):
        return found
    if parallel.sp is not None:
        return [*found, "sp"]
    return [*found, "ep"] if parallel.ep is not None and parallel.dispatch == "replicated" else found


def group_of_role(parallel: ParallelConfig, role: str) -> RankGroup:
    """One of the config's groups, by its name there."""
    group: RankGroup = getattr(parallel, role)
    return group


def _cut_of(config: MoEConfig, name: str) -> tuple[int, int]:
    """The dim that slices cut, and of how many parts it consists."""
    if name == "down_a":
        return 3, 1
    return 2, 2 if as_activation(config.activation).gated and config.gate_up_layout == "packed" else 1


def _each(lora: LoRAWeights, function: Callable[[str, Tensor], Tensor]) -> LoRAWeights:
    tensors = {name: getattr(lora, name) for name in ("gate_up_a", "gate_up_b", "down_a", "down_b")}
    return LoRAWeights(**{name: None if t is None else function(name, t) for name, t in tensors.items()})
