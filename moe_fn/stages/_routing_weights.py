"""Routing weights from logits and chosen expert ids: scores, renormalization and scales."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.numerics import accumulation_dtype, root
from moe_fn.ops.arithmetic import ARITHMETIC
from moe_fn.records import RouterWeights, Routing
from moe_fn.stages._scores import scores_of, transformed_logits


def routing_weights(
    config: MoEConfig, extra: RouterWeights, logits: Tensor, choose: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns (expert ids, their weights, weights of shared experts or None). `choose` maps transformed logits to (ids,
    weights before renormalization).
    """
    router, arithmetic = config.router, ARITHMETIC[config.batch_invariant]
    z = transformed_logits(config, logits)
    shared = (
        z.narrow(-1, config.num_choices, z.shape[-1] - config.num_choices) if z.shape[-1] > config.num_choices else None
    )
    z = z.narrow(-1, 0, config.num_choices) if shared is not None else z
    shared = None if shared is None else scores_of(config, shared)
    ids, chosen = choose(z)
    if router.renormalize:
        total = _norm(config, chosen if shared is None else torch.cat([chosen, shared], -1))
        chosen = chosen / arithmetic.expand_rows(total, chosen.shape[-1])
        shared = None if shared is None else shared / arithmetic.expand_rows(total, shared.shape[-1])
    if extra.expert_scale is not None:
        scale = extra.expert_scale.to(chosen.dtype)
        # gather from an expanded row: its gradient is a sum in a fixed order. Indexing would scatter with atomics.
        chosen = chosen * scale.narrow(0, 0, config.num_choices).expand(z.shape).gather(-1, ids)
        shared = None if shared is None else shared * scale.narrow(0, config.num_choices, shared.shape[-1])
    if router.scale_on == "weights" and router.routed_scaling_factor != 1.0:
        chosen = chosen * router.routed_scaling_factor
        shared = None if shared is None else shared * router.routed_scaling_factor
    dtype = accumulation_dtype(logits.dtype)
    return ids, chosen.to(dtype), None if shared is None else shared.to(dtype)


def without_padding(routing: Routing, token_mask: Tensor) -> Routing:
    """Returns the routing with ids -1 and weights 0 for padding tokens."""
    keep = token_mask.unsqueeze(-1)
    shared = routing.shared_weights
    return dataclasses.replace(
        routing,
        expert_ids=torch.where(keep, routing.expert_ids, -1),
        weights=torch.where(keep, routing.weights, 0),
        shared_weights=None if shared is None else torch.where(keep, shared, 0),
    )


def _norm(config: MoEConfig, weights: Tensor) -> Tensor:
    router, arithmetic = config.router, ARITHMETIC[config.batch_invariant]
    order = router.renormalize_order
    if order == 1.0:
        total = arithmetic.row_sum(weights.abs())
    elif order == 2.0 and config.batch_invariant:
        total = root(arithmetic.row_sum(weights.square()))
    else:
        total = torch.linalg.vector_norm(weights, order, -1, keepdim=True)
    if router.renormalize_epsilon:
        total = total + router.renormalize_epsilon
    if router.renormalize_minimum:
        total = total.clamp(min=router.renormalize_minimum)
    return torch.where(total > 0, total, 1)
