"""The stage that routes: logits to Routing, in torch's ops. `moe_fn.fused.route` runs it, or one op in its place."""

import dataclasses

import torch
from torch import Tensor

from moe_fn.backends import backend_of
from moe_fn.config import MoEConfig
from moe_fn.numerics import accumulation_dtype
from moe_fn.ops.dense import dense_product, product_of_all
from moe_fn.records import MoEWeights, RouterWeights, Routing
from moe_fn.stages._routing_weights import routing_weights
from moe_fn.stages._scores import SELECTIONS, top_k_weights


def choose_experts(config: MoEConfig, extra: RouterWeights, logits: Tensor, token_ids: Tensor | None) -> Routing:
    """Ids of the chosen experts and their weights [T, top_k], for logits [T, num_logits]."""
    select = SELECTIONS[config.router.selection]
    ids, chosen, shared = routing_weights(config, extra, logits, lambda z: select(config, extra, z, token_ids))
    return Routing(expert_ids=ids, weights=chosen, shared_weights=shared)


def weights_of_ids(config: MoEConfig, logits: Tensor, correction_bias: Tensor | None, ids: Tensor) -> Tensor:
    """Routing weights [T, top_k] of experts that are chosen already, as a function of the logits."""
    extra = RouterWeights(correction_bias=correction_bias)
    return routing_weights(config, extra, logits, lambda z: (ids, top_k_weights(config, extra, z, ids)))[1]


def within_capacity(config: MoEConfig, routing: Routing, capacity: int, leading: tuple[int, ...] | None) -> Routing:
    """Drops slots beyond an expert's capacity: id -1, weight 0.

    Positions come from comparisons and a cumulative sum of [slots, experts] numbers, without a host sync.
    """
    ids = routing.expert_ids
    in_order = (
        (ids.unsqueeze(0) if leading is None else ids.view(*leading, ids.shape[-1])).transpose(-1, -2).flatten(-2)
    )
    taken = in_order.unsqueeze(-1) == torch.arange(config.num_experts, device=ids.device)
    # 1, 2, ...; 0 for slots without an expert
    place = (taken.to(torch.int32).cumsum(-2, dtype=torch.int32) * taken).sum(-1)
    fits = (place <= capacity).unflatten(-1, (ids.shape[-1], -1)).transpose(-1, -2).reshape(ids.shape)
    return dataclasses.replace(
        routing, expert_ids=torch.where(fits, ids, -1), weights=torch.where(fits, routing.weights, 0)
    )


def router_logits(config: MoEConfig, weights: MoEWeights, x: Tensor) -> Tensor:
    """Returns the logits of the gate, x @ gate.T + bias, in float32 or in the dtype of x: [tokens, width] -> [tokens,
    num_logits].
    """
    router = weights.router
    if router is None or router.gate is None:
        raise ValueError("moe_forward: logits and weights.router.gate are None; expected one of them")
    dtype = accumulation_dtype(x.dtype) if config.router.gate_dtype == "float32" else x.dtype
    x, gate = x.to(dtype), router.gate.to(dtype)
    # On a CPU torch's product of 1 token runs on one core and takes 100 us longer than the native product.
    logits = product_of_all(config, x, gate) if backend_of(config, x) == "native" else dense_product(config, x, gate)
    return logits if router.bias is None else logits + router.bias.to(dtype)
