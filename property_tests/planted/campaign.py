"""Planted bugs that are smaller than a tolerance but larger than an error bound, and one of the campaign."""

from typing import Any

import torch
from campaign import running

from moe_fn.stages import _activation, _scores, combine, experts
from planted.bugs import PlantedBug, after, before


def _through(dtype: torch.dtype) -> Any:
    """A bug that rounds the result to a dtype."""
    return after(lambda t, *_: t.to(dtype).to(t.dtype))


BOUND = "the_error_of_the_layer_is_within_its_bound"
BUGS = (
    PlantedBug(BOUND, "outputs of experts are rounded to float32", experts._experts, _through(torch.float32)),
    PlantedBug(
        BOUND,
        "activations are too large by a factor of 1.00001",
        _activation.activate,
        after(lambda a, *_: a * 1.00001),
    ),
    PlantedBug(BOUND, "sums of slots are rounded to bfloat16", combine._combine, _through(torch.bfloat16)),
    PlantedBug(BOUND, "logits are rounded to bfloat16", _scores.transformed_logits, _through(torch.bfloat16)),
    PlantedBug(
        "a_campaign_that_goes_on_is_one_that_never_stopped",
        "a continued run starts from the first problem",
        running._checked,
        before(lambda indices, *rest: (list(range(len(indices))), *rest)),
    ),
)
