"""The layer on flat tokens: stages in the order of the contract, and nothing else. `moe_fn.forward` puts the public shape around it."""

import functools

import torch
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.fused.routed_experts import routed_experts
from moe_fn.records import MoEWeights, Routing
from moe_fn.stages.join import addends, join
from moe_fn.stages.reduce_and_trunc import reduce_and_trunc
from moe_fn.stages.route import route, router_logits
from moe_fn.stages.shared import shared_experts
from moe_fn.stages.transform import norm_for_gate, norm_output, transform_input, transform_output
from moe_fn.stages.zero_experts import zero_experts


def logits_of_tokens(config: MoEConfig, weights: MoEWeights, x: Tensor) -> Tensor:
    """Logits of the gate inside the layer, from x or from what the experts see."""
    seen = norm_for_gate(config, x) if config.router.gate_input == "original" else transform_input(config, weights, x)
    return router_logits(config, weights, seen)


def route_tokens(
    config: MoEConfig,
    weights: MoEWeights,
    x: Tensor,
    logits: Tensor | None,
    token_ids: Tensor | None,
    token_mask: Tensor | None,
    leading: tuple[int, ...] | None = None,
) -> tuple[Tensor, Routing]:
    """(logits, routing), from the logits given or from the gate inside the layer."""
    logits = logits_of_tokens(config, weights, x) if logits is None else logits
    return logits, route(config, weights, logits, token_ids=token_ids, token_mask=token_mask, leading=leading)


def layer_of_tokens(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> Tensor:
    """Everything behind the router."""
    routed, shared = routed_and_shared(config, weights, x, routing)
    return norm_output(config, weights, zero_experts(config, weights, x, routing, join(routed, shared)))


def routed_and_shared(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
    """The two addends of the layer; shared is None where there are no shared experts."""
    routed = routed_experts(config, weights, transform_input(config, weights, x), routing)
    routed = reduce_and_trunc(routed, width=config.routed_size)
    shared = shared_experts(config, weights, x, routing)
    return addends(config, routed, shared, functools.partial(transform_output, config, weights))


def parts_of_tokens(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """(shared, routed), whose sum is layer_of_tokens."""
    routed, shared = routed_and_shared(config, weights, x, routing)
    return torch.zeros_like(routed) if shared is None else shared, zero_experts(config, weights, x, routing, routed)


def without_padding(x: Tensor, token_mask: Tensor | None) -> Tensor:
    """Zeros in the rows of padding tokens, whatever they held: NaN there must reach neither outputs nor gradients."""
    return x if token_mask is None else torch.where(token_mask.unsqueeze(-1), x, 0)
