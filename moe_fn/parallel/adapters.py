"""LoRA adapters of a sharded layer: each rank's part, and the ranks over which gradients are summed.

                 tensor parallel                      expert parallel
    gate_up_a    whole                                the rank's experts, or whole where experts share
    gate_up_b    slice of the outputs, as gate_up     the same
    down_a       slice of the inputs, as down         the same
    down_b       whole                                the same

down_b (down_a a) is linear in the slices of a, so the layer's sum over tp adds up its parts too.
"""

from collections.abc import Callable

from torch import Tensor

from moe_fn.config import MoEConfig, ParallelConfig, RankGroup
from moe_fn.ops import collectives
from moe_fn.parallel.cutting import own_part
from moe_fn.records import LoRAWeights
from moe_fn.weights.axes import axes_of
from moe_fn.weights.spec import WEIGHTS

# tensors that are whole on every rank of tp
_WHOLE = tuple(path[1] for path, row in WEIGHTS.items() if path[0] == "lora" and "I" not in axes_of(row.axes))


def shard_adapters(config: MoEConfig, lora: LoRAWeights | None, experts: Tensor) -> LoRAWeights | None:
    """This rank's adapters: those of `experts` where experts do not share a tensor, and its slice of each."""
    if lora is None or config.lora is None or config.parallel is None:
        return lora
    return _each(lora, lambda name, t: own_part(config, ("lora", name), t, experts))


def adapters_of_each(config: MoEConfig, lora: LoRAWeights | None) -> LoRAWeights | None:
    """The adapters, with gradients summed over the ranks that have copies and use them for the same tokens."""
    if lora is None or config.parallel is None:
        return lora
    parallel = config.parallel

    def copied(name: str, t: Tensor) -> Tensor:
        for role in summed_over(config, parallel, name):
            t = collectives.copy_to_ranks(t, group_of_role(parallel, role))
        return t

    return _each(lora, copied)


def summed_over(config: MoEConfig, parallel: ParallelConfig, name: str) -> list[str]:
    """The groups whose ranks have the same tokens and a copy of this tensor, and use it for their slice or experts."""
    found = ["tp"] if parallel.tp is not None and name in _WHOLE else []
    if config.lora is None or not config.lora.shares(name):
        return found
    if parallel.sp is not None:
        return [*found, "sp"]
    return [*found, "ep"] if parallel.ep is not None and parallel.row.same_tokens else found


def group_of_role(parallel: ParallelConfig, role: str) -> RankGroup:
    """The config's group of a role: "tp", "ep", "dp" or "sp"."""
    group: RankGroup = getattr(parallel, role)
    return group


def _each(lora: LoRAWeights, function: Callable[[str, Tensor], Tensor]) -> LoRAWeights:
    tensors = {name: getattr(lora, name) for name in ("gate_up_a", "gate_up_b", "down_a", "down_b")}
    return LoRAWeights(**{name: None if t is None else function(name, t) for name, t in tensors.items()})
