"""Moves between two placements of experts: the fewest transfers, with balanced senders.

Plain Python on the host.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_fn.balance.placement import Placement
from moe_fn.balance.slots import Slots, checked_slots


@dataclass(frozen=True)
class Move:
    """A copy of one expert's weights from physical slot `source` to `target`; layer is 0 where there is one layer."""

    layer: int
    source: int
    target: int


@dataclass(frozen=True, kw_only=True)
class Moves:
    """The moves that turn `previous` into `new`. A slot without a move keeps its expert.

    copies     from a slot of the previous placement to a slot of the same GPU
    transfers  from a slot of the previous placement to a slot of another GPU: the traffic between GPUs
    repeats    from the target of a transfer to a slot of the same GPU: an expert is received once and fills several
               slots
    """

    num_gpus: int
    num_physical: int
    copies: tuple[Move, ...]
    transfers: tuple[Move, ...]
    repeats: tuple[Move, ...]

    def gpu_of(self, slot: int) -> int:
        """The GPU that a slot is on."""
        return slot // (self.num_physical // self.num_gpus)


def transfers(previous: Placement, new: Placement, num_gpus: int) -> Moves:
    """The fewest transfers that turn `previous` into `new`: one for each pair of a GPU and an expert that is new on it.

    Placements of one layer or of equally many layers. In each layer, senders are chosen to minimize the transfers of
    the busiest sender (`balanced_senders`).

    Raises ValueError for placements of different shapes, and if num_gpus does not divide the slots.

    Laws
        Moves turn the previous placement into the new one.
        A GPU receives an expert at most once and only if it lacks it.
        The busiest sender has the fewest possible transfers.

    >>> import torch
    >>> from moe_fn.balance import placement_of_slots
    >>> slots = torch.tensor([[0, 1, 2, 0], [1, 1, 2, 0]])  # slot 0 gets expert 1, which is on its GPU
    >>> moves = transfers(placement_of_slots(slots[0], num_experts=3), placement_of_slots(slots[1], num_experts=3),
    ...     num_gpus=2)
    >>> moves.copies, moves.transfers
    ((Move(layer=0, source=1, target=0),), ())
    """
    shape, num_experts = tuple(new.logical_of_physical.shape), new.num_replicas.shape[-1]
    if num_gpus < 1 or shape[-1] % num_gpus:
        raise ValueError(f"transfers: num_gpus={num_gpus} does not divide the {shape[-1]} slots; expected a divisor")
    olds = checked_slots("transfers: previous.logical_of_physical", previous.logical_of_physical, shape, num_experts)
    news = checked_slots("transfers: new.logical_of_physical", new.logical_of_physical, shape, num_experts)
    per_gpu = shape[-1] // num_gpus
    copies: list[Move] = []
    sent: list[Move] = []
    busy: Counter[int] = Counter()
    repeats: list[Move] = []
    for layer, (old, wanted) in enumerate(zip(olds, news, strict=True)):
        first_target: dict[tuple[int, int], int] = {}  # (first slot of a GPU, expert that is new on it) -> slot
        for target, expert in enumerate(wanted):
            start = target // per_gpu * per_gpu
            here = old[start : start + per_gpu]
            if old[target] == expert:
                continue
            if expert in here:
                copies.append(Move(layer, start + here.index(expert), target))
            elif (start, expert) in first_target:
                repeats.append(Move(layer, first_target[start, expert], target))
            else:
                first_target[start, expert] = target
        of_layer = _with_senders(
            layer, old, [(expert, slot) for (_, expert), slot in first_target.items()], per_gpu, busy
        )
        busy.update(move.source // per_gpu for move in of_layer)
        sent += of_layer
    return Moves(
        num_gpus=num_gpus, num_physical=shape[-1], copies=tuple(copies), transfers=tuple(sent), repeats=tuple(repeats)
    )


def balanced_senders(choices: Sequence[Sequence[int]], sent_before: Mapping[int, int] | None = None) -> list[int]:
    """A sender for each transfer out of its `choices`, so that the busiest sender sends as few as possible; ties go to
    the GPU with fewer `sent_before`.

    Each transfer in turn is assigned along the alternating path that ends at the least busy GPU: a GPU that can send
    it, or one that can take over a transfer from the GPU before it in the path. This is optimal, as no path to a less
    busy GPU remains (Harvey et al. 2006, semi-matchings).

    >>> balanced_senders([[0, 1], [0], [1]])
    [0, 0, 1]
    >>> balanced_senders([[0, 1], [0]])
    [1, 0]
    """
    sender: list[int] = []
    before = sent_before or {}
    sends: dict[int, list[int]] = {gpu: [] for gpus in choices for gpu in gpus}
    for new, gpus in enumerate(choices):
        # GPU -> (transfer that it would take over, GPU that sends it now)
        came: dict[int, tuple[int, int | None]] = dict.fromkeys(gpus, (new, None))
        line = deque(gpus)
        while line:
            gpu = line.popleft()
            for transfer in sends[gpu]:
                for other in choices[transfer]:
                    if other not in came:
                        came[other] = (transfer, gpu)
                        line.append(other)
        sender.append(-1)
        at: int | None = min(came, key=lambda gpu: (len(sends[gpu]), before.get(gpu, 0), gpu))
        while at is not None:
            transfer, giver = came[at]
            if giver is not None:
                sends[giver].remove(transfer)
            sends[at].append(transfer)
            sender[transfer] = at
            at = giver
    return sender


def _with_senders(
    layer: int, old: Slots, wanted: list[tuple[int, int]], per_gpu: int, busy: Mapping[int, int]
) -> list[Move]:
    holders: dict[int, dict[int, int]] = {}  # expert -> GPU -> its first slot there
    for slot, expert in enumerate(old):
        holders.setdefault(expert, {}).setdefault(slot // per_gpu, slot)
    chosen = balanced_senders([list(holders[expert]) for expert, _ in wanted], busy)
    return [Move(layer, holders[expert][gpu], target) for (expert, target), gpu in zip(wanted, chosen, strict=True)]


def sends_per_gpu(moves: Moves) -> list[int]:
    """How many transfers each GPU sends.

    >>> sends_per_gpu(Moves(num_gpus=2, num_physical=4, copies=(), transfers=(Move(0, 3, 1),), repeats=()))
    [0, 1]
    """
    count = Counter(moves.gpu_of(move.source) for move in moves.transfers)
    return [count[gpu] for gpu in range(moves.num_gpus)]
