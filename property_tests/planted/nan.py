"""Planted bugs of the laws in test_not_finite."""

from typing import Any

import torch

from moe_fn.fused import routed_experts
from planted.bugs import PlantedBug, after


def _of_the_whole_batch(y: Any, *args: Any) -> Any:
    return y + 0 * y.sum(0, keepdim=True)


def _scaled_by_the_whole_batch(y: Any, *args: Any) -> Any:
    return y * (1 + 0 * y.sum(0, keepdim=True))


def _of_every_expert(y: Any, config: Any, weights: Any, *args: Any) -> Any:
    return y + 0 * weights.down.to(y.dtype).sum()


BUGS = (
    PlantedBug(
        "non_finite_values_of_a_token_affect_no_other_token",
        "the sum of the batch times 0 is added",
        routed_experts.routed_experts,
        after(_of_the_whole_batch),
    ),
    PlantedBug(
        "nan_in_a_token_is_nan_in_its_output",
        "NaN is replaced by 0",
        routed_experts.routed_experts,
        after(lambda y, *args: torch.nan_to_num(y)),
    ),
    PlantedBug(
        "non_finite_weights_of_an_expert_affect_only_its_tokens",
        "the weights of all experts times 0 are added",
        routed_experts.routed_experts,
        after(_of_every_expert),
    ),
    PlantedBug(
        "non_finite_values_do_not_reach_gradients_of_other_tokens",
        "the output is multiplied by a sum over the batch",
        routed_experts.routed_experts,
        after(_scaled_by_the_whole_batch),
    ),
)
