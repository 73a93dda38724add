"""Balance of experts: pure functions, values in and out."""

from moe_fn.balance.losses import (
    expert_load,
    load_balancing_loss,
    router_z_loss,
    sequence_balancing_loss,
    stats_of_routing,
    update_correction_bias,
)

__all__ = [
    "expert_load", "load_balancing_loss", "router_z_loss", "sequence_balancing_loss", "stats_of_routing", "update_correction_bias",
]  # fmt: skip
