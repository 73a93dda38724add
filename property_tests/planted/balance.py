"""Planted bugs of the placement of experts, its index maps, loads and moves."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from moe_fn import balance, numerics
from moe_fn.balance import move_weights, packing
from planted.bugs import PlantedBug, after, before, instead


def _in_given_order(weights: Sequence[float], num_packs: int) -> list[list[int]]:
    room = len(weights) // num_packs
    return [list(range(pack * room, (pack + 1) * room)) for pack in range(num_packs)]


def _in_the_dtype_of_the_bias(bias: torch.Tensor, load: torch.Tensor, rate: float) -> torch.Tensor:
    load = load.to(bias.dtype)
    return bias + rate * torch.sign(load.mean(-1, keepdim=True) - load)


BUGS = (
    PlantedBug(
        "losses_in_narrow_dtypes_equal_those_in_float64",
        "sums in the dtype of the scores",
        numerics.accumulation_dtype,
        instead(lambda dtype: dtype),
    ),
    PlantedBug(
        "a_bias_in_any_dtype_moves_by_exact_loads",
        "loads are rounded to the dtype of the bias",
        balance.update_correction_bias,
        instead(_in_the_dtype_of_the_bias),
    ),
    PlantedBug(
        "a_bias_in_any_dtype_moves_by_exact_loads",
        "the mean is over all layers",
        balance.update_correction_bias,
        after(
            lambda new, bias, load, rate: (
                bias.to(new.dtype) + rate * torch.sign(load.double().mean() - load).to(new.dtype)
            )
        ),
    ),
    PlantedBug(
        "every_expert_is_placed",
        "the expert with most tokens has every slot",
        packing.replicate,
        after(lambda slots, *a: slots[-1:] * len(slots)),
    ),
    PlantedBug(
        "gpus_are_balanced_within_the_proven_bound",
        "items are packed in the given order",
        packing.pack,
        instead(_in_given_order),
    ),
    PlantedBug(
        "packs_differ_by_the_heaviest_item_at_most",
        "items are packed in the given order",
        packing.pack,
        instead(_in_given_order),
    ),
    PlantedBug(
        "greedy_replication_is_optimal",
        "replicas are given to experts in turn, whatever their load",
        packing.replicate,
        instead(lambda load, slots: [slot % len(load) for slot in range(slots)]),
    ),
    PlantedBug(
        "a_placement_is_never_worse_than_the_previous_one",
        "the worse of the two is kept",
        packing._fullest,
        after(lambda most, *a: -most),
    ),
    PlantedBug(
        "relabelling_experts_relabels_the_placement",
        "the first experts get the replicas",
        packing.replicate,
        after(lambda slots, load, *a: [*slots[: len(load)], *(0 for _ in slots[len(load) :])]),
    ),
    PlantedBug(
        "experts_that_stay_on_a_gpu_keep_their_slots",
        "slots are assigned without regard to the previous placement",
        packing._keep_slots,
        instead(lambda new, *a: new),
    ),
    PlantedBug(
        "layers_are_placed_one_by_one",
        "every layer is placed as the first",
        packing.tables_of_slots,
        before(lambda placed, *rest: (placed[:1] * len(placed), *rest)),
    ),
    PlantedBug(
        "physical_ids_map_back_to_the_logical_ids",
        "physical ids are too large by one",
        balance.physical_ids,
        after(
            lambda ids, placement, *a: torch.where(ids >= 0, (ids + 1) % placement.logical_of_physical.shape[0], ids)
        ),
    ),
    PlantedBug(
        "replicas_take_turns",
        "all tokens go to the first replica",
        balance.physical_ids,
        before(lambda placement, ids, *a: (placement, ids, torch.zeros(ids.shape[:-1], dtype=torch.int64))),
    ),
    PlantedBug(
        "ids_of_padding_and_zero_experts_are_kept",
        "id -1 is taken for expert 0",
        balance.physical_ids,
        after(lambda ids, *a: ids.clamp(min=0)),
    ),
    PlantedBug(
        "ids_of_padding_and_zero_experts_are_kept",
        "zero experts keep their logical ids",
        balance.physical_ids,
        after(lambda new, placement, ids, *a: torch.where(ids < placement.num_replicas.shape[0], new, ids)),
    ),
    PlantedBug(
        "a_layer_on_physical_slots_is_the_logical_layer",
        "weights of slots are sorted by logical id",
        balance.physical_weights,
        before(lambda weights, p: (weights, replace(p, logical_of_physical=p.logical_of_physical.sort().values))),
    ),
    PlantedBug(
        "loads_keep_their_totals",
        "only first replicas count",
        balance.logical_load,
        instead(lambda placement, load: load.gather(-1, placement.physical_of_logical[..., 0])),
    ),
    PlantedBug(
        "loads_keep_their_totals",
        "every replica counts the whole load of its expert",
        balance.gpu_load,
        before(
            lambda placement, *rest: (replace(placement, num_replicas=torch.ones_like(placement.num_replicas)), *rest)
        ),
    ),
    PlantedBug(
        "a_window_is_the_sum_of_the_last_loads",
        "the step is not advanced",
        balance.push,
        after(lambda new, old, load: replace(new, step=old.step)),
    ),
    PlantedBug(
        "moves_turn_the_previous_placement_into_the_new_one",
        "copies within a GPU are left out",
        balance.transfers,
        after(lambda m, *a: replace(m, copies=())),
    ),
    PlantedBug(
        "moves_turn_the_previous_placement_into_the_new_one",
        "repeats are left out",
        balance.transfers,
        after(lambda m, *a: replace(m, repeats=())),
    ),
    PlantedBug(
        "a_gpu_receives_an_expert_at_most_once_and_only_if_it_lacks_it",
        "every slot is sent its own copy",
        balance.transfers,
        after(lambda m, *a: replace(m, transfers=m.transfers + m.copies, copies=())),
    ),
    PlantedBug(
        "the_busiest_sender_has_the_fewest_possible_transfers",
        "the first GPU that has an expert sends it",
        balance.balanced_senders,
        instead(lambda choices, *a: [gpus[0] for gpus in choices]),
    ),
    PlantedBug(
        "moved_weights_are_the_weights_of_the_new_placement",
        "weights are sent in reverse order",
        move_weights.departing,
        after(lambda parts, *a: [part.flip(0) for part in parts]),
    ),
)
