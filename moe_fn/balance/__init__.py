"""Balance of experts: losses and a bias that even out their load, and copies of experts placed where the load is.

losses     load of a routing, of one rank and of all, losses, the correction bias: what training does
placement  placing, slots: which expert lies in which slot of which GPU; physical_ids sends a router's choices there
window     loads of the last steps, summed
moves      moving: what has to go where when the placement changes, and how it gets there

In a layer whose experts lie on several GPUs (ParallelConfig.num_physical), every so many steps; stats.expert_load is of
this rank's tokens:

    window = push(window, stats.expert_load.narrow(0, 0, num_experts))                # each step, in the graph; zero
                                                                                      experts lie nowhere
    load = load_over_ranks(total(window), group)                                      # now and then, on the host: the
                                                                                      same on every rank
    new = place_experts(load, num_physical, groups, nodes, gpus, previous=placement)
    weights, placement = move_experts(weights, placement, new, group), new

and the router's weights get the new placement's tensors. A layer of your own on physical slots, with physical_ids
before it, counts slots: there it is logical_load(placement, expert_load(physical, num_physical)).
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
