"""Placements from lists of physical slots: builds the tables of a Placement on the host."""

from typing import Any

import torch
from torch import Tensor

from moe_fn.balance.placement import Placement
from moe_fn.checks import INTEGERS, check_kind

Slots = list[int]  # logical expert of each physical slot


def placement_of_slots(logical_of_physical: Tensor, num_experts: int) -> Placement:
    """The placement with these experts in the physical slots: for a custom policy, or [0 .. E-1] for no replicas.

    logical_of_physical [P] or [layers, P] integers, on any device; the result is on the CPU. Raises ValueError for ids
    out of range and for experts without a slot.

    >>> placement_of_slots(torch.tensor([1, 0, 1]), num_experts=2).physical_of_logical.tolist()
    [[1, -1], [0, 2]]
    """
    check_kind("placement_of_slots", "logical_of_physical", logical_of_physical, Tensor)
    shape = tuple(logical_of_physical.shape)
    if len(shape) not in (1, 2) or logical_of_physical.dtype not in INTEGERS or num_experts < 1:
        came = f"{logical_of_physical.dtype} {list(shape)} and num_experts={num_experts}"
        raise ValueError(
            f"placement_of_slots: logical_of_physical is {came}; expected integers [P] or [layers, P], num_experts >= 1"
        )
    return tables_of_slots(
        checked_slots("placement_of_slots: logical_of_physical", logical_of_physical, shape, num_experts),
        num_experts,
        shape,
    )


def checked_slots(where: str, logical_of_physical: Tensor, shape: tuple[int, ...], num_experts: int) -> list[Slots]:
    """The slots of each layer as Python ints; ValueError for another shape, and experts missing or out of range."""
    if tuple(logical_of_physical.shape) != shape:
        raise ValueError(f"{where} is {list(logical_of_physical.shape)}; expected {list(shape)}")
    rows: list[Slots] = logical_of_physical.view(-1, shape[-1]).tolist()
    every = set(range(num_experts))
    for layer, slots in enumerate(rows):
        if set(slots) != every:
            wrong = sorted(set(slots) ^ every)[:8]
            raise ValueError(
                f"{where}: experts {wrong} of row {layer} are missing or out of range; "
                f"expected each of 0 .. {num_experts - 1}"
            )
    return rows


def fields_of_slots(name: str, logical_of_physical: Tensor) -> dict[str, int]:
    """The expert of each slot by the slot's name in errors, for comparison between ranks; empty for a meta tensor."""
    if logical_of_physical.is_meta:
        return {}
    return {f"slot {slot} of {name}": expert for slot, expert in enumerate(logical_of_physical.flatten().tolist())}


def tables_of_slots(placed: list[Slots], num_experts: int, shape: tuple[int, ...]) -> Placement:
    """The Placement of checked slots; shape is that of logical_of_physical."""
    slots_of: list[list[list[int]]] = [[[] for _ in range(num_experts)] for _ in placed]
    for layer, slots in enumerate(placed):
        for slot, expert in enumerate(slots):
            slots_of[layer][expert].append(slot)
    count = [[len(slots) for slots in layer] for layer in slots_of]
    widest = max((max(layer) for layer in count), default=1)
    padded = [[slots + [-1] * (widest - len(slots)) for slots in layer] for layer in slots_of]

    def tensor(values: list[Any], *sizes: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).view(*shape[:-1], *sizes)

    return Placement(
        logical_of_physical=tensor(placed, shape[-1]),
        physical_of_logical=tensor(padded, num_experts, widest),
        num_replicas=tensor(count, num_experts),
    )
