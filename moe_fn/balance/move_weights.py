"""Moves expert weights between GPUs to a new placement, over a process group.

The layer can use the old weights until the new ones are complete.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_fn.balance.meeting import differing_fields, format_ranks, meet
from moe_fn.balance.placement import Placement, checked_placement
from moe_fn.balance.plan_moves import Moves, transfers
from moe_fn.balance.slots import fields_of_slots
from moe_fn.checks import check_kind
from moe_fn.kernels.native import library as native
from moe_fn.kernels.native import support as kernels
from moe_fn.records import WEIGHT_PATHS, MoEWeights, Path, leaves_of_weights, weights_of_leaves
from moe_fn.weights.shapes import MATRICES, is_prepared
from moe_fn.weights.spec import EXPERT_PATHS

_LORA = "lora"  # experts are dim 1 of adapters


def physical_weights(weights: MoEWeights, placement: Placement) -> MoEWeights:
    """Weights of the physical slots: every tensor of experts [E, ...] becomes [P, ...]. Other tensors are returned as
    they are.

    A GPU's part is a contiguous range of slots. placement of one layer. Prepared weights stay prepared. Raises
    ValueError for another number of experts.

    Laws
        A layer on physical slots is the logical layer.

    >>> from moe_fn.balance import placement_of_slots
    >>> weights = MoEWeights(gate_up=torch.tensor([[[1.0]], [[2.0]]]), down=torch.ones(2, 1, 1))
    >>> physical_weights(weights, placement_of_slots(torch.tensor([0, 1, 0]), num_experts=2)).gate_up.flatten().tolist()
    [1.0, 2.0, 1.0]
    """
    placement = checked_placement("physical_weights", placement)
    slots, num_experts = placement.logical_of_physical, placement.num_replicas.shape[-1]
    tensors = _expert_tensors("physical_weights", weights, num_experts)
    if slots.ndim != 1:
        raise ValueError(
            f"physical_weights: placement.logical_of_physical is {list(slots.shape)}; expected [P], one layer"
        )
    return _with_tensors(weights, {name: t.index_select(0, slots.to(t.device)) for name, t in tensors.items()})


def move_experts(
    weights: MoEWeights,
    previous: Placement,
    new: Placement,
    group: "dist.ProcessGroup | None" = None,
    timeout_s: float = 60,
) -> MoEWeights:
    """This rank's weights under the new placement, from `weights` under the previous one, which are not written to.

    weights         gate_up, down and, if present, biases, expert_norm, scales, [P / ranks, ...] of one layer; may be
                    prepared
    previous, new   placements of one layer, the same on every rank; GPU g is rank g of the group
    group           None: all ranks
    timeout_s       how long a rank waits for the others' records

    First the ranks compare their placements, slot by slot, and the shapes and dtypes of their tensors, in the store of
    torch.distributed as check_ranks_agree does. Then one all-to-all of bytes runs, with sizes from the placements, so
    tensors are not read on the host. Every rank of the group must call it, also one that neither sends nor receives;
    without transfers there is no collective. Weights are moved bit for bit, without gradients. A GPU receives an expert
    once, however many of its slots it fills. Peak memory: the old weights, the new ones, and the bytes sent and
    received.

    Raises ValueError on every rank that called, with the same message, before anything is sent: for placements of
    several layers, of different shapes, or that do not fit the group or a rank's weights; where ranks have different
    placements (as when each placed by its own load, not by `load_over_ranks`) or different tensors; and for a rank that
    does not call within timeout_s.

    Laws
        Moved weights are the weights of the new placement.
    """
    return start_moving(weights, previous, new, group, timeout_s)()


def start_moving(
    weights: MoEWeights,
    previous: Placement,
    new: Placement,
    group: "dist.ProcessGroup | None" = None,
    timeout_s: float = 60,
) -> Callable[[], MoEWeights]:
    """move_experts in two steps: starts the transfers once all ranks have called, and returns a function that waits for
    them and returns the new weights.

    In between, the layer can use the old weights, which must not be written to.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("move_experts: this process is not in the group; expected one of its ranks")
    moves = _agreed_moves(weights, previous, new, group, timeout_s)
    if not moves.transfers:
        return lambda: weights_after_moves(weights, moves, rank, [])
    outgoing = departing(weights, moves, rank)
    lengths = [_bytes_of_expert(weights, moves.num_physical // ranks) * count for count in _counts_from(moves, rank)]
    sent = torch.cat(outgoing)
    received = sent.new_empty(sum(lengths))
    work = dist.all_to_all_single(received, sent, lengths, [len(part) for part in outgoing], group=group, async_op=True)

    def finish(sent: Tensor = sent) -> MoEWeights:  # keeps `sent` alive until it is sent
        work.wait()
        return weights_after_moves(weights, moves, rank, list(received.split(lengths)))

    return finish


def departing(weights: MoEWeights, moves: Moves, rank: int) -> list[Tensor]:
    """The bytes that this rank sends to each rank: for each of moves.transfers, in order, all tensors of the expert."""
    per_gpu = moves.num_physical // moves.num_gpus
    tensors = _expert_tensors("move_experts", weights, per_gpu)
    parts: list[list[Tensor]] = [[tensors[("gate_up",)].new_empty(0, dtype=torch.uint8)] for _ in range(moves.num_gpus)]
    for move in moves.transfers:
        if moves.gpu_of(move.source) == rank:
            parts[moves.gpu_of(move.target)] += [_as_bytes(t[move.source % per_gpu]) for t in tensors.values()]
    return [torch.cat(part) for part in parts]


def weights_after_moves(weights: MoEWeights, moves: Moves, rank: int, received: Sequence[Tensor]) -> MoEWeights:
    """The new weights of this rank: kept slots, copies on this rank, and the bytes received from each rank (in the
    format of `departing`).
    """
    per_gpu = moves.num_physical // moves.num_gpus
    tensors = _expert_tensors("move_experts", weights, per_gpu)
    source = list(range(per_gpu))
    for move in moves.copies:
        if moves.gpu_of(move.target) == rank:
            source[move.target % per_gpu] = move.source % per_gpu
    with torch.no_grad():
        moved = {name: t.index_select(0, torch.tensor(source, device=t.device)) for name, t in tensors.items()}
        read = [0] * moves.num_gpus
        for move in moves.transfers:
            if moves.gpu_of(move.target) == rank:
                sender = moves.gpu_of(move.source)
                for t in moved.values():
                    slot = t[move.target % per_gpu]
                    slot.copy_(_from_bytes(received[sender].narrow(0, read[sender], slot.nbytes), slot))
                    read[sender] += slot.nbytes
        for move in moves.repeats:
            if moves.gpu_of(move.target) == rank:
                for t in moved.values():
                    t[move.target % per_gpu].copy_(t[move.source % per_gpu])
    if is_prepared(weights.gate_up) and kernels.problem(weights.gate_up.device.type, weights.gate_up.dtype) is None:
        # in huge pages, as prepare_weights returns them
        moved |= {path: native.in_huge_pages(moved[path]) for path in MATRICES}
    return _with_tensors(weights, moved)


def _agreed_moves(
    weights: MoEWeights, previous: Placement, new: Placement, group: "dist.ProcessGroup | None", timeout_s: float
) -> Moves:
    """The moves, checked to be the same on every rank; ValueError on every rank if they differ or a rank has errors."""
    ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    problems: list[str] = []
    fields: dict[str, str | int] = {}
    moves = None
    try:
        check_kind("move_experts", "weights", weights, MoEWeights)
        moves = _moves_of_layer(previous, new, len(ranks))
        tensors = _expert_tensors("move_experts", weights, moves.num_physical // len(ranks))
        fields = {f"weights.{'.'.join(path)}": f"{t.dtype} {list(t.shape)}" for path, t in tensors.items()}
        fields |= fields_of_slots("previous", previous.logical_of_physical) | fields_of_slots(
            "new", new.logical_of_physical
        )
    except ValueError as error:  # published, not raised yet: the other ranks wait for this rank's record
        problems = [str(error).removeprefix("move_experts: ")]
    answer = meet(ranks, dist.get_rank(), json.dumps({"problems": problems, "fields": fields}), timeout_s, _differences)
    if answer or moves is None:
        raise ValueError(f"move_experts: {answer}")
    return moves


def _differences(texts: dict[int, str]) -> list[str]:
    """Messages of ranks' errors, or else the first three differences between their records."""
    records = {rank: json.loads(text) for rank, text in texts.items()}
    ranks_of_problem: dict[str, list[int]] = {}
    for rank, record in records.items():
        for problem in record["problems"]:
            ranks_of_problem.setdefault(problem, []).append(rank)
    if ranks_of_problem:
        return [f"{format_ranks(ranks)}: {problem}" for problem, ranks in ranks_of_problem.items()]
    found = differing_fields({rank: record["fields"] for rank, record in records.items()})
    more = [f"and {len(found) - 3} more"] if len(found) > 3 else []
    expected = "expected the same on every rank, of placements that are made from load_over_ranks(load)"
    return [f"{', '.join([*found[:3], *more])}; {expected}"] if found else []


def _moves_of_layer(previous: Placement, new: Placement, ranks: int) -> Moves:
    check_kind("move_experts", "previous", previous, Placement)
    check_kind("move_experts", "new", new, Placement)
    if new.logical_of_physical.ndim != 1:
        raise ValueError(
            f"move_experts: new.logical_of_physical is {list(new.logical_of_physical.shape)}; expected [P], one layer"
        )
    return transfers(previous, new, ranks)


def _expert_tensors(where: str, weights: MoEWeights, experts: int) -> dict[Path, Tensor]:
    leaves = zip(WEIGHT_PATHS, leaves_of_weights(weights), strict=True)
    tensors = {path: leaf for path, leaf in leaves if path in EXPERT_PATHS and leaf is not None}
    for path, tensor in tensors.items():
        if tensor.shape[0] != experts:
            raise ValueError(
                f"{where}: weights.{'.'.join(path)} is {list(tensor.shape)}; expected {experts} experts in dim 0"
            )
    return tensors | _adapters(weights, experts)


def _adapters(weights: MoEWeights, experts: int) -> dict[Path, Tensor]:
    """LoRA tensors [L, E, ...] as [E, L, ...], without those that all experts share."""
    lora = (
        {}
        if weights.lora is None
        else {f.name: getattr(weights.lora, f.name) for f in dataclasses.fields(weights.lora)}
    )
    return {(_LORA, name): t.transpose(0, 1) for name, t in lora.items() if t is not None and t.shape[1] == experts}


def _with_tensors(weights: MoEWeights, tensors: dict[Path, Tensor]) -> MoEWeights:
    tensors = {path: t.transpose(0, 1) if path[0] == _LORA else t for path, t in tensors.items()}
    leaves = zip(WEIGHT_PATHS, leaves_of_weights(weights), strict=True)
    return weights_of_leaves([tensors.get(path, leaf) for path, leaf in leaves])


def _counts_from(moves: Moves, rank: int) -> list[int]:
    """How many experts this rank gets from each rank."""
    senders = [moves.gpu_of(move.source) for move in moves.transfers if moves.gpu_of(move.target) == rank]
    return [senders.count(gpu) for gpu in range(moves.num_gpus)]


def _bytes_of_expert(weights: MoEWeights, experts: int) -> int:
    return sum(t[0].nbytes for t in _expert_tensors("move_experts", weights, experts).values())


def _as_bytes(t: Tensor) -> Tensor:
    return t.detach().contiguous().flatten().view(torch.uint8)


def _from_bytes(data: Tensor, like: Tensor) -> Tensor:
    # A copy: the bytes may start at an address that is not aligned for the dtype.
    return data.clone().view(like.dtype).view(like.shape)
