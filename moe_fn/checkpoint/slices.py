"""The slices of a block to load: given as arguments, or one rank's part as in `shard_weights`."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_fn.balance import Placement
from moe_fn.config import MoEConfig
from moe_fn.config.local import experts_of_rank
from moe_fn.records import MoEWeights, Path, RouterWeights
from moe_fn.weights.spec import WEIGHTS


@dataclass(frozen=True)
class Wanted:
    """The arguments of load_moe_weights that select a part of a block."""

    experts: Sequence[int] | None = None
    intermediate: slice | None = None
    shared_intermediate: slice | None = None
    placement: Placement | None = None


@dataclass(frozen=True)
class Slices:
    """The part of a block to load: experts, and ranges of the intermediate dimensions."""

    experts: Sequence[int]
    intermediate: tuple[int, int]
    shared_intermediate: tuple[int, int]

    def sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The sizes of the part, from those of the whole."""
        return (
            dict(sizes) | {"E": len(self.experts)} | {axis: stop - start for axis, (start, stop) in self.ranges.items()}
        )

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """The ranges of the axes that slices cut."""
        return {"I": self.intermediate, "M": self.shared_intermediate}


def is_added_here(slices: Slices, path: Path) -> bool:
    """Whether these slices include a tensor: the bias of a down projection belongs to the first slice only."""
    row = WEIGHTS.get(path)  # None for tensors that a matrix is decoded from
    return row is None or row.added_after is None or slices.ranges[row.added_after][0] == 0


def slices_of(config: MoEConfig, wanted: Wanted) -> Slices:
    """The slices that these arguments or config.parallel select; all by default.

    Raises ValueError for slices that are out of range, and for arguments together with config.parallel.
    """
    if config.parallel is None:
        return _slices_by_hand(config, wanted)
    for name in ("experts", "intermediate", "shared_intermediate"):
        if getattr(wanted, name) is not None:
            raise ValueError(
                f"{name} is {getattr(wanted, name)!r:.80} with config.parallel; expected None, because config.parallel "
                "selects this rank's part"
            )
    (slices, number), (slices_of_shared, shared) = config.parallel.slices, config.parallel.slices_of_shared
    width = config.intermediate_size // slices
    shared_width = config.shared.intermediate_size // slices_of_shared if config.shared else 0
    return Slices(
        _experts_of_rank(config, wanted.placement),
        (number * width, (number + 1) * width),
        (shared * shared_width, (shared + 1) * shared_width),
    )


def _slices_by_hand(config: MoEConfig, wanted: Wanted) -> Slices:
    experts = wanted.experts
    if wanted.placement is not None:
        raise ValueError("placement would have no effect; expected None, or a config with parallel.num_physical")
    # a range: the config's number of experts may be arbitrarily large
    chosen = range(config.num_experts) if experts is None else tuple(experts)
    if experts is not None and not (chosen and all(type(e) is int and 0 <= e < config.num_experts for e in chosen)):
        raise ValueError(f"experts is {experts!r:.80}; expected ids in 0..{config.num_experts - 1}, at least one")
    width = config.shared.intermediate_size if config.shared else 0
    return Slices(
        chosen,
        _bounds("intermediate", wanted.intermediate, config.intermediate_size),
        _bounds("shared_intermediate", wanted.shared_intermediate, width),
    )


def _bounds(name: str, wanted: slice | None, size: int) -> tuple[int, int]:
    if wanted is None:
        return 0, size
    start, stop = 0 if wanted.start is None else wanted.start, size if wanted.stop is None else wanted.stop
    if type(start) is not int or type(stop) is not int or wanted.step not in (None, 1) or not 0 <= start < stop <= size:
        raise ValueError(f"{name} is {wanted!r}; expected a nonempty slice of 0..{size}, without a step")
    return start, stop


def _experts_of_rank(config: MoEConfig, placement: Placement | None) -> tuple[int, ...]:
    """This rank's experts in its order, or the experts of its slots if experts are replicated."""
    parallel = config.parallel
    if parallel is None or (parallel.num_physical is None) != (placement is None):
        num_physical = None if parallel is None else parallel.num_physical
        there = "None" if placement is None else "given"
        raise ValueError(f"placement is {there} with parallel.num_physical={num_physical}; expected both or neither")
    mine = experts_of_rank(config, parallel)
    if placement is None:
        return mine
    if not isinstance(placement, Placement):
        raise ValueError(f"placement is a {type(placement).__name__}; expected a moe_fn.balance.Placement")
    slots, experts = tuple(placement.logical_of_physical.shape), tuple(placement.num_replicas.shape)
    if slots != (parallel.num_physical,) or experts != (config.num_experts,):
        raise ValueError(
            f"placement is of {list(slots)} slots and {list(experts)} experts; expected one layer's, [num_physical] = "
            f"[{parallel.num_physical}] and [num_experts] = [{config.num_experts}]"
        )
    return tuple(int(placement.logical_of_physical[slot]) for slot in mine)


def with_placement(weights: MoEWeights, placement: Placement | None) -> MoEWeights:
    """The weights with the placement's tensors in `router`."""
    if placement is None:
        return weights
    tensors = {
        field.name: getattr(placement, field.name).to(weights.down.device) for field in dataclasses.fields(placement)
    }
    return dataclasses.replace(weights, router=dataclasses.replace(weights.router or RouterWeights(), **tensors))
