"""Config of expert, tensor, data and sequence parallelism: names and sizes of rank groups, no process-group handles."""

from dataclasses import dataclass
from typing import Any, Literal, Self

from moe_fn.checks import check_bool, check_choice, check_int

Dispatch = Literal["replicated", "all_gather", "all_to_all", "all_to_all_static"]
Placement = Literal["linear", "round_robin"] | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DispatchRow:
    """What a format of dispatch needs of ParallelConfig, and how rows travel.

    groups       the groups of ranks with different tokens, of which it needs one; none: all ranks have all tokens
    by_slot      each slot is a row of its own that is sent to its expert's rank and back; the sum over the slots of a
                 token is computed on the token's rank
    reads_sizes  whether sizes are read on the host
    max_tokens   whether ParallelConfig.max_tokens is used
    capacity     whether ParallelConfig.capacity is used
    logits       whether gather="logits" is possible
    """

    groups: tuple[str, ...] = ()
    by_slot: bool = False
    reads_sizes: Literal["never", "always", "without max_tokens"] = "never"
    max_tokens: Literal["unused", "optional", "required"] = "unused"
    capacity: bool = False
    logits: bool = False

    @property
    def same_tokens(self) -> bool:
        """Whether the ranks of ep have the same tokens."""
        return not self.groups


DISPATCHES: dict[str, DispatchRow] = {
    "replicated": DispatchRow(),
    "all_gather": DispatchRow(
        groups=("ep", "dp"), reads_sizes="without max_tokens", max_tokens="optional", logits=True
    ),
    "all_to_all": DispatchRow(groups=("ep",), by_slot=True, reads_sizes="always"),
    "all_to_all_static": DispatchRow(groups=("ep",), by_slot=True, max_tokens="required", capacity=True),
}


@dataclass(frozen=True, kw_only=True)
class RankGroup:
    """A group of ranks: its name in torch.distributed, its size, and this rank's index in it.

    ordered  sum over ranks in the order of the ranks, in float32 or wider, and round once. Bits of a sum then do not
             depend on the position in the tensor; collectives do not guarantee this for three or more ranks. The
             payload is the same, but the sum does not overlap with the layer's other work
    """

    name: str
    size: int
    rank: int
    ordered: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"RankGroup.name is {self.name!r}; expected the name of a process group")
        check_int("RankGroup.size", self.size, 1)
        check_int("RankGroup.rank", self.rank, 0, self.size - 1)
        check_bool("RankGroup.ordered", self.ordered)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The ranks that share a layer, and how tokens reach their experts. Each rank has its own, made by `from_mesh`.

    tp            ranks with the same tokens; each has a slice of every expert's intermediate size, and outputs are
                  summed over the ranks
    ep            ranks with different experts
    dp            ranks with different tokens and the same weights, without communication in forward (except with
                  dispatch="all_gather")
    sp            sequence parallelism: ranks whose inputs and outputs are the same tokens, and which compute a part of
                  the rows each. ep includes these ranks
    dispatch      "replicated": ranks of ep have the same tokens, each computes its experts, and outputs are summed.
                  The others are for different tokens on each rank of ep.
                  "all_gather": each rank computes its experts for the tokens of all ranks, followed by a
                  reduce-scatter. Without ep, tokens are gathered over dp, and weights are sliced over dp x tp.
                  "all_to_all": each slot travels to the rank of its expert and back, with split sizes from the data
                  (one host sync).
                  "all_to_all_static": the same, with `capacity` slots for each pair of ranks and no host sync
    gather        what all_gather gathers with the tokens: their "routing" (ids and weights), or their "logits", which
                  every rank then routes
    placement     the ep rank of each expert: "linear" (the first ranks have one more if the division has a remainder),
                  "round_robin", or a tuple of ranks
    num_physical  number of expert slots over all ranks of ep, equal on each, for replicas of loaded experts. Tensors of
                  a `moe_fn.balance.Placement` in weights.router map slots to experts. None: one slot per expert
    max_tokens    largest number of tokens on a rank, for all_gather and all_to_all_static; None: exchanged in every
                  call (a host sync), which all_to_all_static does not support
    capacity      slots that one rank can send to another in all_to_all_static; None: max_tokens * top_k, the most that
                  can occur. A smaller capacity drops slots: `moe_forward_with_stats` counts them, moe_forward raises
    shared        shared experts are "sharded" over tp like the routed ones, or "replicated" on every rank

    >>> tp = RankGroup(name="0", size=2, rank=1)
    >>> ParallelConfig(tp=tp).slices
    (2, 1)
    """

    tp: RankGroup | None = None
    ep: RankGroup | None = None
    dp: RankGroup | None = None
    sp: RankGroup | None = None
    dispatch: Dispatch = "replicated"
    gather: Literal["routing", "logits"] = "routing"
    placement: Placement = "linear"
    num_physical: int | None = None
    max_tokens: int | None = None
    capacity: int | None = None
    shared: Literal["sharded", "replicated"] = "sharded"

    def __post_init__(self) -> None:
        for name in ("tp", "ep", "dp", "sp"):
            if not isinstance(getattr(self, name), RankGroup | None):
                raise ValueError(f"ParallelConfig.{name} is {getattr(self, name)!r}; expected a RankGroup or None")
        check_choice("ParallelConfig.dispatch", self.dispatch, tuple(DISPATCHES))
        check_choice("ParallelConfig.gather", self.gather, ("routing", "logits"))
        check_choice("ParallelConfig.shared", self.shared, ("sharded", "replicated"))
        if isinstance(self.placement, list):
            object.__setattr__(self, "placement", tuple(self.placement))  # from JSON
        if isinstance(self.placement, tuple):
            for expert, rank in enumerate(self.placement):
                check_int(f"ParallelConfig.placement[{expert}]", rank, 0, (self.ep.size if self.ep else 1) - 1)
        else:
            check_choice("ParallelConfig.placement", self.placement, ("linear", "round_robin"))
        for name in ("max_tokens", "capacity", "num_physical"):
            if getattr(self, name) is not None:
                check_int(f"ParallelConfig.{name}", getattr(self, name), 1)
        self._check_together()

    def _check_together(self) -> None:
        row = self.row
        if row.groups and all(getattr(self, name) is None for name in row.groups):
            ranks = "that tokens travel between" if row.by_slot else "whose tokens are gathered"
            raise ValueError(
                f"ParallelConfig.dispatch={self.dispatch!r}: expected {' or '.join(row.groups)}, the ranks {ranks}"
            )
        if row.max_tokens == "required" and self.max_tokens is None:
            raise ValueError(f"ParallelConfig.max_tokens is None with dispatch={self.dispatch!r}: expected a number")
        if row.max_tokens == "unused" and self.max_tokens is not None:
            raise ValueError(
                f"ParallelConfig.max_tokens would have no effect with dispatch={self.dispatch!r}: expected None"
            )
        if self.capacity is not None and not row.capacity:
            raise ValueError(
                f"ParallelConfig.capacity would have no effect with dispatch={self.dispatch!r}: expected None"
            )
        if self.gather != "routing" and not row.logits:
            raise ValueError(
                f"ParallelConfig.gather='logits' would have no effect with dispatch={self.dispatch!r}: "
                "expected 'routing'"
            )
        if self.num_physical is not None and (
            self.ep is None or self.placement != "linear" or self.num_physical % self.ep.size
        ):
            raise ValueError(
                f"ParallelConfig.num_physical={self.num_physical}: expected ep, a multiple of its size, placement "
                "'linear'"
            )
        if self.placement != "linear" and self.ep is None:
            raise ValueError("ParallelConfig.placement would have no effect without ep: expected 'linear'")
        if self.sp is not None and (self.tp is not None or self.ep is None or row.same_tokens):
            raise ValueError(
                "ParallelConfig.sp: expected tp=None, an ep that includes sp's ranks, and a dispatch other than "
                "'replicated'"
            )
        if self.sp is not None and self.shared == "sharded":
            raise ValueError(
                "ParallelConfig.shared='sharded' with sp: expected 'replicated', because its ranks have different rows"
            )

    @property
    def row(self) -> DispatchRow:
        """The row of the format of dispatch."""
        return DISPATCHES[self.dispatch]

    @property
    def slices(self) -> tuple[int, int]:
        """(number of slices of the intermediate size, index of this rank's slice)."""
        size, rank = (self.tp.size, self.tp.rank) if self.tp else (1, 0)
        if "dp" in self.row.groups and self.ep is None and self.dp is not None:
            return self.dp.size * size, self.dp.rank * size + rank
        return size, rank

    @property
    def slices_of_shared(self) -> tuple[int, int]:
        """(number of slices of the shared experts' intermediate size, index of this rank's slice)."""
        return (1, 0) if self.tp is None or self.shared == "replicated" else (self.tp.size, self.tp.rank)

    @classmethod
    def from_mesh(
        cls,
        mesh: Any,
        *,
        tp: str | None = None,
        ep: str | None = None,
        dp: str | None = None,
        sequence_parallel: bool = False,
        dispatch: Dispatch | None = None,
        gather: Literal["routing", "logits"] = "routing",
        placement: Placement = "linear",
        num_physical: int | None = None,
        max_tokens: int | None = None,
        capacity: int | None = None,
        shared: Literal["sharded", "replicated"] | None = None,
        ordered_sums: bool = False,
    ) -> Self:
        """Returns the config of this rank in a torch.distributed.device_mesh.DeviceMesh with named dimensions.

        sequence_parallel  ranks of `tp` split rows and experts instead of the intermediate size; ep becomes (ep x) tp
        dispatch           None: "all_to_all" with ep, else "replicated"
        shared             None: "replicated" with sequence_parallel, else "sharded"
        ordered_sums       RankGroup.ordered of every group

        Dimensions of size 1 become None. Raises ValueError for names that the mesh does not have, and for one name in
        two places.
        """
        if not hasattr(mesh, "mesh_dim_names"):
            raise ValueError(f"ParallelConfig.from_mesh: mesh is a {type(mesh).__name__}; expected a DeviceMesh")
        check_bool("ParallelConfig.from_mesh: sequence_parallel", sequence_parallel)
        names = tuple(mesh.mesh_dim_names or ())
        for field, name in (("tp", tp), ("ep", ep), ("dp", dp)):
            if name is not None and name not in names:
                raise ValueError(
                    f"ParallelConfig.from_mesh: {field}={name!r}; expected one of the mesh's dimensions, {names}"
                )
        for field, name, other, same in (("tp", tp, "ep", ep), ("tp", tp, "dp", dp), ("ep", ep, "dp", dp)):
            if name is not None and name == same:
                raise ValueError(
                    f"ParallelConfig.from_mesh: {field} and {other} are both {name!r}; expected different dimensions"
                )
        if sequence_parallel and tp is None:
            raise ValueError(
                "ParallelConfig.from_mesh: sequence_parallel=True without tp: expected tp, the ranks that split "
                "the sequence"
            )
        check_bool("ParallelConfig.from_mesh: ordered_sums", ordered_sums)
        groups = {field: _group(mesh, name, ordered_sums) for field, name in (("tp", tp), ("ep", ep), ("dp", dp))}
        sp = None
        if sequence_parallel and groups["tp"] is not None:
            sp, groups["tp"] = groups["tp"], None
            both = tuple(name for name in names if name in (ep, tp))
            groups["ep"] = (
                sp if groups["ep"] is None else _group_of_mesh(mesh[both]._flatten("_".join(both)), ordered_sums)
            )
        default = "all_to_all" if groups["ep"] is not None else "replicated"
        return cls(
            **groups,
            sp=sp,
            dispatch=dispatch or default,  # type: ignore[arg-type]
            gather=gather,
            placement=placement,
            num_physical=num_physical,
            max_tokens=max_tokens,
            capacity=capacity,
            shared=shared or ("sharded" if sp is None else "replicated"),
        )


def _group(mesh: Any, name: str | None, ordered: bool) -> RankGroup | None:
    return None if name is None else _group_of_mesh(mesh[name], ordered)


def _group_of_mesh(mesh: Any, ordered: bool) -> RankGroup | None:
    """Returns the group of a mesh with one dimension; None for a mesh of one rank."""
    if mesh.size() == 1:
        return None
    return RankGroup(name=mesh.get_group().group_name, size=mesh.size(), rank=mesh.get_local_rank(), ordered=ordered)
