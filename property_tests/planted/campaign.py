"""Bugs planted where a tolerance would be too wide, and in the campaign itself."""

from typing import Any

import torch
from campaign import running

from moe_fn.stages import _activation, _scores, combine, experts
from planted.bugs import PlantedBug, after, before


def _through(dtype: torch.dtype) -> Any:
    """A result that was rounded to a dtype on its way."""
    return after(lambda t, *_: t.to(dtype).to(t.dtype))


BOUND = "the_error_of_the_layer_is_within_its_bound"
BUGS = (
    PlantedBug(BOUND, "experts in float64 come back from float32", experts._experts, _through(torch.float32)),
    PlantedBug(BOUND, "activations are 0.00001 too large", _activation.activate, after(lambda a, *_: a * 1.00001)),
    PlantedBug(BOUND, "sums of slots are rounded to bfloat16", combine._combine, _through(torch.bfloat16)),
    PlantedBug(BOUND, "logits are rounded to bfloat16", _scores.transformed_logits, _through(torch.bfloat16)),
    PlantedBug(
        "a_campaign_that_goes_on_is_one_that_never_stopped",
        "a run that goes on starts from the first problem",
        running._checked,
        before(lambda indices, *rest: (list(range(len(indices))), *rest)),
    ),
)
