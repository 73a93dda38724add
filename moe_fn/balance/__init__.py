"""Balance of experts: losses and a bias that even out their load, and copies of experts placed where the load is.

losses     load of a routing, losses, the correction bias: what training does
placement  placing, slots: which expert lies in which slot of which GPU; physical_ids sends a router's choices there
window     loads of the last steps, summed
moves      moving: what has to go where when the placement changes, and how it gets there

In a model whose experts lie on several GPUs, every so many steps:

    window = push(window, logical_load(placement, stats.expert_load))                 # each step, in the graph
    new = place_experts(total(window), P, groups, nodes, gpus, previous=placement)    # now and then, on the host
    weights, placement = move_experts(weights, placement, new, group), new
"""

from moe_fn.balance.losses import (
    expert_load,
    load_balancing_loss,
    router_z_loss,
    sequence_balancing_loss,
    stats_of_routing,
    update_correction_bias,
)
from moe_fn.balance.moves import Move, Moves, balanced_senders, sends_per_gpu, transfers
from moe_fn.balance.moving import move_experts, physical_weights, start_moving
from moe_fn.balance.placement import Placement, balancedness, gpu_load, logical_load, physical_ids, placement_at
from moe_fn.balance.placing import pack, place_experts, replicate
from moe_fn.balance.slots import placement_of_slots
from moe_fn.balance.window import LoadWindow, load_window, push, total

__all__ = [
    "LoadWindow", "Move", "Moves", "Placement", "balanced_senders", "balancedness", "expert_load", "gpu_load", "load_balancing_loss",
    "load_window", "logical_load", "move_experts", "pack", "physical_ids", "physical_weights", "place_experts", "placement_at",
    "placement_of_slots", "push", "replicate", "router_z_loss", "sends_per_gpu", "sequence_balancing_loss", "start_moving",
    "stats_of_routing", "total", "transfers", "update_correction_bias",
]  # fmt: skip
