"""Bounds of a layer's rounding error, by running error analysis: every value carries an error bound."""

from moe_fn.testing.bounds.layer import Bound, error_bound, logits_again

__all__ = ["Bound", "error_bound", "logits_again"]
