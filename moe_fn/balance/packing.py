"""Placement of experts on GPUs from their measured load (EPLB).

Plain Python on the host, between steps.
"""

import heapq
import math
from collections.abc import Sequence

from torch import Tensor

from moe_fn.balance.placement import Placement
from moe_fn.balance.slots import Slots, checked_slots, tables_of_slots

# A relative gain below this is rounding: the same experts on the same GPUs, summed in another order.
ROUNDING = 1e-12


def place_experts(
    load: Tensor, num_physical: int, num_groups: int, num_nodes: int, num_gpus: int, previous: Placement | None = None
) -> Placement:
    """Places replicas of experts on GPUs to minimize the largest load of a GPU; replicas share their expert's load
    evenly.

        1. groups of experts are packed on nodes        (skipped where num_nodes does not divide num_groups: "global")
        2. in each node, slot by slot, the expert with the largest load per replica gets one more
        3. in each node, replicas are packed on its GPUs
        4. on each GPU, experts that `previous` had there keep their slots
        pack: heaviest item first, each into the lightest pack with room; all packs have equally many items; ties go to
        the lowest number

    load [E] or [layers, E], integers or floats >= 0, on any device; layers are placed independently. num_physical is
    the number of slots P; GPU g has the g-th range of P / num_gpus slots. Returns a Placement on the CPU with the
    leading dimensions of load. A layer keeps its `previous` placement unless the new one lowers the load of its fullest
    GPU (under the new load).

    With G GPUs, total load T and s the largest load per replica, which step 2 makes as small as it can be, at most T /
    (P - E + 1):

        packing    any two packs differ by the heaviest item at most, so  max <= mean + (1 - 1/packs) * heaviest item
        global     fullest GPU <= T/G + (1 - 1/G) s <= (2 - 1/G) of the best possible, which is at least T/G and at
                   least s
        hierarchical   the same inside each node, whose load is at most T/nodes + (1 - 1/nodes) * heaviest group

    Why packs differ by the heaviest item w at most: let Q be full before P, b the size of the current item, and f(Q) =
    sum of (item - b) over the items of Q. As b decreases, f(P) - f(Q) grows only while P has more items than Q; then it
    is load(P) - load(Q) minus a multiple of b, and load(P) - load(Q) <= w while both have room, since each took its
    last item as the lightest. So f(P) - f(Q) <= w when Q is full, and each item that P gets afterwards is at most b. In
    the other direction, load(Q) <= load(P) + the last item of Q.

    Raises ValueError for sizes that do not divide, fewer slots than experts, a load that is negative, infinite or NaN,
    and a previous placement of other shapes.

    Laws
        Every expert is placed.
        GPUs are balanced within the proven bound.
        Greedy replication is optimal.
        A placement is never worse than the previous one.
        Relabelling experts relabels the placement.
        Experts that stay on a GPU keep their slots.
        Layers are placed one by one.

    Source: EPLB of DeepSeek-V3 (arXiv 2412.19437, github.com/deepseek-ai/EPLB), step 4 as in vLLM.

    >>> import torch
    >>> placement = place_experts(torch.tensor([8, 1, 1, 2]), num_physical=6, num_groups=1, num_nodes=1, num_gpus=2)
    >>> placement.logical_of_physical.tolist(), placement.num_replicas.tolist()
    ([0, 0, 2, 0, 3, 1], [3, 1, 1, 1])
    """
    rows, num_experts = _checked_load(load)
    if num_groups < 1 or num_nodes < 1:
        raise ValueError(f"place_experts: num_groups={num_groups}, num_nodes={num_nodes}; expected at least 1")
    if num_groups % num_nodes:
        num_groups, num_nodes = 1, 1
    _check_sizes(num_experts, num_physical, num_groups, num_nodes, num_gpus)
    placed = [_place_layer(row, num_physical, num_groups, num_nodes, num_gpus) for row in rows]
    if previous is not None:
        shape = (*load.shape[:-1], num_physical)
        olds = checked_slots(
            "place_experts: previous.logical_of_physical", previous.logical_of_physical, shape, num_experts
        )
        per_gpu = num_physical // num_gpus
        placed = [
            _keep_slots(new, old, per_gpu)
            if _fullest(new, row, per_gpu) < _fullest(old, row, per_gpu) * (1 - ROUNDING)
            else old
            for new, old, row in zip(placed, olds, rows, strict=True)
        ]
    return tables_of_slots(placed, num_experts, (*load.shape[:-1], num_physical))


def pack(weights: Sequence[float], num_packs: int) -> list[list[int]]:
    """Items of each pack, equally many in each: heaviest first, each into the lightest pack with room, ties to the
    lowest number.

    With one item per pack, item i is in pack i. Raises ValueError if num_packs does not divide the number of items.

    Laws
        Packs differ by the heaviest item at most.

    >>> pack([1, 5, 3, 3], 2)
    [[1, 0], [2, 3]]
    """
    if num_packs < 1 or len(weights) % num_packs:
        raise ValueError(f"pack: {len(weights)} items do not fill {num_packs} packs evenly; expected a divisor")
    room = len(weights) // num_packs
    if room == 1:
        return [[item] for item in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    lightest = [(0.0, number) for number in range(num_packs)]  # a heap: smallest load, then lowest number
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        total, number = lightest[0]
        packs[number].append(item)
        if len(packs[number]) < room:
            heapq.heapreplace(lightest, (total + weights[item], number))
        else:
            heapq.heappop(lightest)
    return packs


def replicate(load: Sequence[float], num_slots: int) -> Slots:
    """Expert of each slot: every expert once, then slot by slot the one with the largest load per replica, ties to the
    lowest number.

    This minimizes the largest load per replica. In another division, some expert has fewer replicas than here, so its
    load per replica is at least what it was here before its last replica was added, when it was the largest of all.

    >>> replicate([8, 3, 1], 5)
    [0, 1, 2, 0, 0]
    """
    if num_slots < len(load):
        raise ValueError(f"replicate: num_slots={num_slots}; expected at least one for each of {len(load)} experts")
    slots, count = list(range(len(load))), [1] * len(load)
    heaviest = [(-share, expert) for expert, share in enumerate(load)]
    heapq.heapify(heaviest)
    for _ in range(num_slots - len(load)):
        expert = heaviest[0][1]
        slots.append(expert)
        count[expert] += 1
        heapq.heapreplace(heaviest, (-load[expert] / count[expert], expert))
    return slots


def _place_layer(load: Sequence[float], num_physical: int, num_groups: int, num_nodes: int, num_gpus: int) -> Slots:
    size = len(load) // num_groups
    groups_of_node = pack([sum(load[group * size : (group + 1) * size]) for group in range(num_groups)], num_nodes)
    placed: Slots = []
    for groups in groups_of_node:
        experts = [group * size + i for group in groups for i in range(size)]
        slots = replicate([load[expert] for expert in experts], num_physical // num_nodes)
        share = _shares([experts[i] for i in slots], load)
        for gpu in pack(share, num_gpus // num_nodes):
            placed += [experts[slots[item]] for item in gpu]
    return placed


def _keep_slots(new: Slots, old: Slots, per_gpu: int) -> Slots:
    """The new slots, reordered on each GPU: experts that it had before keep their slots, the rest follow in order."""
    kept: Slots = []
    for start in range(0, len(new), per_gpu):
        rest = new[start : start + per_gpu]
        stays: list[int | None] = []
        for expert in old[start : start + per_gpu]:
            stays.append(expert if expert in rest else None)
            if expert in rest:
                rest.remove(expert)
        kept += [rest.pop(0) if expert is None else expert for expert in stays]
    return kept


def _shares(slots: Slots, load: Sequence[float]) -> list[float]:
    count = [0] * len(load)
    for expert in slots:
        count[expert] += 1
    return [load[expert] / count[expert] for expert in slots]


def _fullest(slots: Slots, load: Sequence[float], per_gpu: int) -> float:
    share = _shares(slots, load)
    return max(sum(share[start : start + per_gpu]) for start in range(0, len(slots), per_gpu))


def _checked_load(load: Tensor) -> tuple[list[list[float]], int]:
    """Rows of the load as Python floats, and the number of experts."""
    if not isinstance(load, Tensor) or load.ndim not in (1, 2) or load.shape[-1] < 1 or load.dtype.is_complex:
        came = f"{load.dtype} {list(load.shape)}" if isinstance(load, Tensor) else f"a {type(load).__name__}"
        raise ValueError(f"place_experts: load is {came}; expected a tensor of numbers, [E] or [layers, E]")
    rows: list[list[float]] = load.detach().double().cpu().view(-1, load.shape[-1]).tolist()
    for layer, row in enumerate(rows):
        for expert, value in enumerate(row):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"place_experts: load of expert {expert} in row {layer} is {value}; expected a finite number >= 0"
                )
    return rows, load.shape[-1]


def _check_sizes(num_experts: int, num_physical: int, num_groups: int, num_nodes: int, num_gpus: int) -> None:
    if num_physical < num_experts:
        raise ValueError(
            f"place_experts: num_physical={num_physical}; expected at least one slot for each of {num_experts} experts"
        )
    for name, value, divisor_name, divisor in (
        ("the number of experts", num_experts, "num_groups", num_groups),
        ("num_gpus", num_gpus, "num_nodes", num_nodes),
        ("num_physical", num_physical, "num_gpus", num_gpus),
    ):
        if value < 1 or divisor < 1 or value % divisor:
            raise ValueError(f"place_experts: {name} is {value}; expected a multiple of {divisor_name}={divisor}")
