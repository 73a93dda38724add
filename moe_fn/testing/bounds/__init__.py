"""The bound of a layer's rounding error, by running error analysis: every number carries how far off it may be."""

from moe_fn.testing.bounds.layer import Bound, error_bound, logits_again

__all__ = ["Bound", "error_bound", "logits_again"]
