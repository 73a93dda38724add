"""Load balancing of experts: losses, a correction bias, and placement of replicated experts on GPUs (EPLB).

losses          load of a routing, on one rank and over all; balancing losses; the correction bias, for training
placement       the record of which expert is in which physical slot; physical_ids maps a router's choices to slots
packing, slots  a placement from loads, or from a list of slots
window          sum of the loads of the last steps
plan_moves      the transfers that turn one placement into another
move_weights    carries the transfers out over a process group

In a layer with replicated experts (ParallelConfig.num_physical); stats.expert_load counts this rank's tokens:

    # each step, in the graph; zero experts have no slots
    window = push(window, stats.expert_load.narrow(0, 0, num_experts))
    # every N steps, on the host; the load is the same on every rank
    load = load_over_ranks(total(window), group)
    new = place_experts(load, num_physical, groups, nodes, gpus, previous=placement)
    weights, placement = move_experts(weights, placement, new, group), new

Then weights.router gets the tensors of the new placement. A layer that runs on physical slots itself, with
physical_ids before it, counts slots; its load is logical_load(placement, expert_load(physical, num_physical)).
"""

from moe_fn.balance.losses import (
    expert_load,
    load_balancing_loss,
    load_over_ranks,
    router_z_loss,
    sequence_balancing_loss,
    stats_of_routing,
    update_correction_bias,
)
from moe_fn.balance.move_weights import move_experts, physical_weights, start_moving
from moe_fn.balance.packing import pack, place_experts, replicate
from moe_fn.balance.placement import Placement, balancedness, gpu_load, logical_load, physical_ids, placement_at
from moe_fn.balance.plan_moves import Move, Moves, balanced_senders, sends_per_gpu, transfers
from moe_fn.balance.slots import placement_of_slots
from moe_fn.balance.window import LoadWindow, load_window, push, total

__all__ = [
    "LoadWindow", "Move", "Moves", "Placement", "balanced_senders", "balancedness", "expert_load", "gpu_load",
    "load_balancing_loss",
    "load_over_ranks", "load_window", "logical_load", "move_experts", "pack", "physical_ids", "physical_weights",
    "place_experts",
    "placement_at", "placement_of_slots", "push", "replicate", "router_z_loss", "sends_per_gpu",
    "sequence_balancing_loss",
    "start_moving", "stats_of_routing", "total", "transfers", "update_correction_bias",
]  # fmt: skip
