"""Reference implementation: the whole layer in float64, one token and one expert at a time.

This package defines what the layer computes. It imports nothing of the code that is compared with it, and is slow.
Gradients of x, the logits and every weight come from autograd. Read `layer.py` first.

Options of speed and precision are ignored: gate_dtype, score_dtype, chunk_tokens, recompute, batch_invariant, backend,
opaque.
"""

from moe_fn.reference.layer import moe_forward, moe_forward_routed
from moe_fn.reference.losses import load_balancing_loss, router_z_loss, sequence_balancing_loss
from moe_fn.reference.routing import route

__all__ = [
    "load_balancing_loss", "moe_forward", "moe_forward_routed", "route", "router_z_loss", "sequence_balancing_loss",
]  # fmt: skip
