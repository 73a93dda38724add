"""move_experts: carries out a new placement over a process group. The layer answers with the old weights until the new ones are there."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_fn.balance.moves import Moves, transfers
from moe_fn.balance.placement import Placement, checked_placement
from moe_fn.kernels import native
from moe_fn.preparing import is_prepared
from moe_fn.records import EXPERT_PATHS, WEIGHT_PATHS, MoEWeights, Path, leaves_of_weights, weights_of_leaves

_LORA = "lora"  # adapters have the experts second


def physical_weights(weights: MoEWeights, placement: Placement) -> MoEWeights:
    """The experts of each slot: every tensor [E, ...] becomes [P, ...]; a GPU's part is a stretch of it. Other tensors are as they were.

    placement of one layer. Prepared weights stay prepared. Raises ValueError for another number of experts.

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
        raise ValueError(f"physical_weights: placement.logical_of_physical is {list(slots.shape)}; expected [P], one layer")
    return _with_tensors(weights, {name: t.index_select(0, slots.to(t.device)) for name, t in tensors.items()})


def move_experts(weights: MoEWeights, previous: Placement, new: Placement, group: "dist.ProcessGroup | None" = None) -> MoEWeights:
    """This rank's weights under the new placement; `weights` are its weights under the previous one, and stay as they are.

    weights   gate_up, down and, where there are any, biases, expert_norm, scales, [P / ranks, ...] of one layer; prepared ones too
    previous, new   placements of one layer, the same on every rank; GPU g is rank g of the group
    group     None: all ranks

    One all-to-all of bytes, with the sizes that the placements tell: no look at tensors, no negotiation. Every rank of the group must call
    it, also those that neither send nor get; where nobody needs anything, nobody communicates. Bit for bit; without gradients. A GPU gets
    an expert once, however many of its slots it fills. Needs room for the new weights beside the old, and for what travels.
    A rank that never comes is an error of the group after its timeout.

    Raises ValueError for placements of several layers, of different shapes, or that do not fit the group or the weights.

    Laws
        Moved weights are the weights of the new placement.
    """
    return start_moving(weights, previous, new, group)()


def start_moving(
    weights: MoEWeights, previous: Placement, new: Placement, group: "dist.ProcessGroup | None" = None
) -> Callable[[], MoEWeights]:
    """move_experts in two steps: starts the transfers and returns at once; what it returns waits for them and makes the new weights.

    In between, the layer goes on with the old weights, which must not be written to.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("move_experts: this process is not in the group; expected one of its ranks")
    moves = _moves_of_layer(previous, new, ranks)
    if not moves.transfers:
        return lambda: arrived(weights, moves, rank, [])
    outgoing = departing(weights, moves, rank)
    lengths = [_bytes_of_expert(weights, moves.num_physical // ranks) * count for count in _counts_from(moves, rank)]
    sent = torch.cat(outgoing)
    received = sent.new_empty(sum(lengths))
    work = dist.all_to_all_single(received, sent, lengths, [len(part) for part in outgoing], group=group, async_op=True)

    def finish(sent: Tensor = sent) -> MoEWeights:  # what is sent must live until it is
        work.wait()
        return arrived(weights, moves, rank, list(received.split(lengths)))

    return finish


def departing(weights: MoEWeights, moves: Moves, rank: int) -> list[Tensor]:
    """What this rank sends to each rank: bytes, expert after expert in the order of moves.transfers, each all of its tensors."""
    per_gpu = moves.num_physical // moves.num_gpus
    tensors = _expert_tensors("move_experts", weights, per_gpu)
    parts: list[list[Tensor]] = [[tensors[("gate_up",)].new_empty(0, dtype=torch.uint8)] for _ in range(moves.num_gpus)]
    for move in moves.transfers:
        if moves.gpu_of(move.source) == rank:
            parts[moves.gpu_of(move.target)] += [_as_bytes(t[move.source % per_gpu]) for t in tensors.values()]
    return [torch.cat(part) for part in parts]


def arrived(weights: MoEWeights, moves: Moves, rank: int, received: Sequence[Tensor]) -> MoEWeights:
    """The new weights of this rank: slots that stay, copies on this rank, and what each rank has sent (as `departing` laid it)."""
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
    if is_prepared(weights.gate_up) and native.problem(weights.gate_up.device.type, weights.gate_up.dtype) is None:
        # As prepare_weights left them.
        moved |= {path: native.in_huge_pages(moved[path]) for path in (("gate_up",), ("down",))}
    return _with_tensors(weights, moved)


def _moves_of_layer(previous: Placement, new: Placement, ranks: int) -> Moves:
    if new.logical_of_physical.ndim != 1:
        raise ValueError(f"move_experts: new.logical_of_physical is {list(new.logical_of_physical.shape)}; expected [P], one layer")
    return transfers(previous, new, ranks)


def _expert_tensors(where: str, weights: MoEWeights, experts: int) -> dict[Path, Tensor]:
    leaves = zip(WEIGHT_PATHS, leaves_of_weights(weights), strict=True)
    tensors = {path: leaf for path, leaf in leaves if path in EXPERT_PATHS and leaf is not None}
    for path, tensor in tensors.items():
        if tensor.shape[0] != experts:
            raise ValueError(f"{where}: weights.{'.'.join(path)} is {list(tensor.shape)}; expected {experts} experts first")
    return tensors | _adapters(weights, experts)


def _adapters(weights: MoEWeights, experts: int) -> dict[Path, Tensor]:
    """LoRA tensors [L, E, ...] as [E, L, ...], but for those that all experts share."""
    lora = {} if weights.lora is None else {f.name: getattr(weights.lora, f.name) for f in dataclasses.fields(weights.lora)}
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
    # A copy: a stretch of bytes may start where a wider number must not.
    return data.clone().view(like.dtype).view(like.shape)
