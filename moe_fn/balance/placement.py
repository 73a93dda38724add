"""Placement of replicated experts in physical slots: its record, the map from expert ids to slots, and loads per
expert, slot and GPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fn.checks import INTEGERS, check_kind, checked_integers
from moe_fn.numerics import accumulation_dtype
from moe_fn.torch_compat import check_same_size


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The logical expert of each physical slot. Each GPU has the same number of slots, in order.

    A pytree. Leading dimensions are those of the load that it was made for: none, or layers. Tensors are int64, or
    other integers.
    """

    logical_of_physical: Tensor  # [..., P]
    physical_of_logical: Tensor  # [..., E, max replicas]: slots of each expert, ascending, padded with -1
    num_replicas: Tensor  # [..., E], at least 1


torch.export.register_dataclass(Placement, serialized_type_name="moe_fn.Placement")


def checked_placement(where: str, placement: Placement) -> Placement:
    """The placement with int64 tensors; ValueError for another type, or for tensors that are not integers."""
    check_kind(where, "placement", placement, Placement)
    return Placement(
        logical_of_physical=checked_integers(where, "placement.logical_of_physical", placement.logical_of_physical),
        physical_of_logical=checked_integers(where, "placement.physical_of_logical", placement.physical_of_logical),
        num_replicas=checked_integers(where, "placement.num_replicas", placement.num_replicas),
    )


def checked_load(where: str, name: str, load: Tensor) -> Tensor:
    """The load in a dtype for sums: int64, float32 or float64; ValueError for other dtypes than integers and floats."""
    check_kind(where, name, load, Tensor)
    if load.is_floating_point():
        return load.to(accumulation_dtype(load.dtype))
    if load.dtype not in INTEGERS:
        raise ValueError(f"{where}: {name} is {load.dtype}; expected an integer or a floating-point dtype")
    return load.to(torch.int64)


def placement_at(placement: Placement, layer: int) -> Placement:
    """The placement of one layer of a placement of layers: [L, ...] -> [...].

    Raises ValueError for a layer out of range.

    >>> from moe_fn.balance import place_experts
    >>> both = place_experts(torch.tensor([[3, 1], [1, 3]]), num_physical=3, num_groups=1, num_nodes=1, num_gpus=1)
    >>> placement_at(both, 1).num_replicas.tolist()
    [1, 2]
    """
    check_kind("placement_at", "placement", placement, Placement)
    if placement.logical_of_physical.ndim != 2:
        raise ValueError(
            f"placement_at: logical_of_physical is {_sizes(placement.logical_of_physical)}; expected [layers, P]"
        )
    if not -(layers := placement.logical_of_physical.shape[0]) <= layer < layers:
        raise ValueError(f"placement_at: layer={layer}; expected one of its {layers} layers")
    return Placement(
        logical_of_physical=placement.logical_of_physical[layer],
        physical_of_logical=placement.physical_of_logical[layer],
        num_replicas=placement.num_replicas[layer],
    )


def physical_ids(placement: Placement, expert_ids: Tensor, token_index: Tensor | None = None) -> Tensor:
    """Maps expert ids to physical slots; the position of a token picks one of the expert's replicas.

        physical[t, j] = slots of expert ids[t, j] [ token_index[t] mod number of its replicas ]

    placement of one layer; expert_ids [..., top_k] integers; token_index [...] integers, None: the position among all
    tokens. Returns [..., top_k] int64, or int32 for int32. Ids of -1 stay -1; zero expert number i, E + i, becomes P +
    i, which is zero expert number i of a config with P experts. Works inside a graph, and is deterministic, so ranks
    and reruns agree. Consecutive tokens of an expert load its replicas evenly to within one; where each call has one
    token (decoding), continue token_index across calls and ranks, since otherwise every call takes the first replica.

    Raises ValueError for a placement of several layers, ids that are not integers, and a token_index of another shape.

    Laws
        Physical ids map back to the logical ids.
        Replicas take turns.
        Ids of padding and zero experts are kept.
        A layer on physical slots is the logical layer.

    Source: vLLM's map, which hashes the token's index (Knuth's multiplier) and is equally even on average.

    >>> from moe_fn.balance import placement_of_slots
    >>> placement = placement_of_slots(torch.tensor([0, 1, 0]), num_experts=2)
    >>> physical_ids(placement, torch.tensor([[0, 1], [0, -1], [0, 2]])).tolist()
    [[0, 1], [2, -1], [0, 3]]
    """
    placement, wide_ids, token_index = _checked_ids(placement, expert_ids, token_index)
    num_experts, max_replicas = placement.physical_of_logical.shape
    num_physical = placement.logical_of_physical.shape[0]
    ids = wide_ids if wide_ids.ndim == 2 else wide_ids.flatten(0, -2)
    index = torch.arange(ids.shape[0], device=ids.device) if token_index is None else token_index.flatten()
    real = (ids >= 0) & (ids < num_experts)
    expert = torch.where(real, ids, 0).flatten()
    replicas = placement.num_replicas.index_select(0, expert).view(ids.shape)
    replica = torch.remainder(index.unsqueeze(-1), replicas)
    slots = (
        placement.physical_of_logical.flatten()
        .index_select(0, expert * max_replicas + replica.flatten())
        .view(ids.shape)
    )
    other = torch.where(ids < 0, ids, ids + (num_physical - num_experts))
    physical = torch.where(real, slots, other).to(torch.int32 if expert_ids.dtype == torch.int32 else torch.int64)
    return physical if expert_ids.ndim == 2 else physical.view(expert_ids.shape)


def logical_load(placement: Placement, load_of_physical: Tensor) -> Tensor:
    """Load per expert from load per slot: [..., P] integers or floats -> [..., E] int64, float32 or float64.

    For a layer of P experts that runs on physical slots itself, with physical_ids before it: its stats count slots. A
    layer with ParallelConfig.num_physical counts experts; pass its stats.expert_load to place_experts directly. Raises
    ValueError for another shape.

    Laws
        Loads keep their totals.

    >>> from moe_fn.balance import placement_of_slots
    >>> logical_load(placement_of_slots(torch.tensor([0, 1, 0]), num_experts=2), torch.tensor([5, 2, 4])).tolist()
    [9, 2]
    """
    placement, load = (
        checked_placement("logical_load", placement),
        checked_load("logical_load", "load_of_physical", load_of_physical),
    )
    slots = placement.logical_of_physical
    if load.shape != slots.shape:
        counts = ", the load per expert already" if load.shape == placement.num_replicas.shape else ""
        raise ValueError(
            f"logical_load: load_of_physical is {_sizes(load)}{counts}; expected {_sizes(slots)}, the placement's slots"
        )
    return load.new_zeros(placement.num_replicas.shape).scatter_add(-1, slots, load)


def gpu_load(placement: Placement, load: Tensor, num_gpus: int) -> Tensor:
    """Load per GPU if replicas share the load of their expert evenly: load [..., E] -> [..., num_gpus] float64.

    Raises ValueError for another shape, or if num_gpus does not divide the slots.

    Laws
        Loads keep their totals.

    >>> from moe_fn.balance import placement_of_slots
    >>> gpu_load(placement_of_slots(torch.tensor([0, 1, 0, 2]), num_experts=3), torch.tensor([6, 1, 2]),
    ...     num_gpus=2).tolist()
    [4.0, 5.0]
    """
    placement, load = checked_placement("gpu_load", placement), checked_load("gpu_load", "load", load)
    slots = placement.logical_of_physical
    if load.shape != placement.num_replicas.shape:
        raise ValueError(
            f"gpu_load: load is {_sizes(load)}; expected {_sizes(placement.num_replicas)}, the placement's experts"
        )
    if num_gpus < 1 or slots.shape[-1] % num_gpus:
        raise ValueError(
            f"gpu_load: num_gpus={num_gpus} does not divide the {slots.shape[-1]} slots; expected a divisor"
        )
    share = (load.to(torch.float64) / placement.num_replicas).gather(-1, slots)
    per_gpu: Tensor = share.unflatten(-1, (num_gpus, -1))
    return per_gpu.sum(-1)


def balancedness(load_per_gpu: Tensor) -> Tensor:
    """Mean / max over the last dimension: 1 when even, 1 / GPUs when one GPU has all load; 1 without load.

    [..., G] integers or floats -> [...] float64, or float32 for float32 and narrower floats.

    It is the mean utilization of the GPUs while the fullest one works.

    >>> balancedness(torch.tensor([[4.0, 4.0], [8.0, 0.0], [0.0, 0.0]])).tolist()
    [1.0, 0.5, 1.0]
    """
    load = checked_load("balancedness", "load_per_gpu", load_per_gpu)
    load = load if load.is_floating_point() else load.to(torch.float64)
    largest = load.amax(-1)
    return torch.where(largest > 0, load.mean(-1) / torch.where(largest > 0, largest, 1), 1)


def _checked_ids(
    placement: Placement, expert_ids: Tensor, token_index: Tensor | None
) -> tuple[Placement, Tensor, Tensor | None]:
    """The arguments of physical_ids, checked, as int64."""
    placement = checked_placement("physical_ids", placement)
    slots = placement.logical_of_physical
    if slots.ndim != 1:
        raise ValueError(
            f"physical_ids: placement.logical_of_physical is {_sizes(slots)}; expected [P], one layer: see placement_at"
        )
    expert_ids = checked_integers("physical_ids", "expert_ids", expert_ids)
    if expert_ids.ndim < 2:
        raise ValueError(
            f"physical_ids: expert_ids is {_sizes(expert_ids)}; expected [..., top_k] with at least 2 dims"
        )
    if token_index is None:
        return placement, expert_ids, None
    token_index = checked_integers("physical_ids", "token_index", token_index)
    if token_index.ndim != expert_ids.ndim - 1:
        raise ValueError(
            f"physical_ids: token_index is {_sizes(token_index)}; expected the leading dims of expert_ids, "
            f"{_sizes(expert_ids)}"
        )
    for dim in range(token_index.ndim):
        if torch.compiler.is_compiling():
            text = "physical_ids: token_index and expert_ids differ in tokens; expected the leading dims of expert_ids"
            check_same_size(token_index.shape[dim], expert_ids.shape[dim], text)
        elif token_index.shape[dim] != expert_ids.shape[dim]:
            wanted = f"expected the leading dims of expert_ids, {_sizes(expert_ids)}"
            raise ValueError(f"physical_ids: token_index is {_sizes(token_index)}; {wanted}")
    return placement, expert_ids, token_index


def _sizes(t: Tensor) -> str:
    return str(list(t.shape))
