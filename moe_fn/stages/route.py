"""route: from logits to expert ids and routing weights.

Computed by torch's ops, or by one op where a kernel supports the router (`moe_fn.ops.route_top_k`).
"""

import dataclasses

import torch
from torch import Tensor

from moe_fn.backends import backend_of, runs
from moe_fn.config import MoEConfig
from moe_fn.kernels.triton.support import router_problem
from moe_fn.numerics import accumulation_dtype
from moe_fn.ops.dense import dense_product, product_of_all
from moe_fn.ops.route_top_k import define_route_top_k
from moe_fn.records import MoEWeights, RouterWeights, Routing
from moe_fn.stages._checks import check_routing_inputs
from moe_fn.stages._routing_weights import routing_weights, without_padding
from moe_fn.stages._scores import SELECTIONS, top_k_weights
from moe_fn.torch_compat import check_draft_export, in_forward_mode
from moe_fn.weights.check import check_layer


def route(
    config: MoEConfig,
    weights: MoEWeights,
    logits: Tensor,
    *,
    token_ids: Tensor | None = None,
    token_mask: Tensor | None = None,
    leading: tuple[int, ...] | None = None,
) -> Routing:
    """Chooses experts for every token, and their routing weights.

        z = f32(logits) * logit_multiplier, soft-capped;   s = score(z), NaN and infinite scores are 0
        ids = the top_k largest of s + correction_bias (in the best groups), ties to the lowest id
        w = s[ids];   w /= max(sum w + epsilon, minimum) or 1 where that is 0; w *= expert_scale[ids] *
                      routed_scaling_factor

    logits [tokens, config.num_logits], any float dtype; token_ids [tokens] integers, for hash routing; token_mask
    [tokens] bool, False for padding, which gets ids -1 and weights 0; leading: dims of the tokens before flattening,
    whose last is the sequence, for a capacity (None: one sequence). Returns ids int64 [tokens, top_k], weights float32
    (float64 for float64). `RouterConfig` and `GroupConfig` have the other forms: scores after the choice, sparsemixer,
    hash, per-group choice.

    Raises ValueError for shapes and dtypes that do not fit the config, and for router weights that have no effect.

    Laws
        Routing equals the reference.
        Ids of a token are distinct and in range.
        Weights are finite and float32.
        Ties go to the lowest expert id.
        Renormalized rows sum to the scale.
        Adding a constant to a softmax row changes nothing.
        Permuting experts permutes ids.
        Groups never chosen contribute nothing.
        The correction bias changes the choice but not the weights.
        Padding tokens have no expert.
        A capacity keeps the first slots of every expert.
        Hash routing ignores how large the logits are.

    Source: Shazeer et al. 2017 (arXiv 1701.06538); groups and bias DeepSeek-V2/V3 (2405.04434, 2412.19437); the models
    in `RouterConfig`.

    >>> config = MoEConfig(num_experts=4, top_k=2, hidden_size=1, intermediate_size=1)
    >>> weights = MoEWeights(gate_up=torch.zeros(4, 2, 1), down=torch.zeros(4, 1, 1))
    >>> route(config, weights, torch.tensor([[0.0, 1.0, 1.0, -1.0]])).expert_ids
    tensor([[1, 2]])
    """
    check_layer("route", config, weights)
    token_ids = check_routing_inputs(config, weights.router or RouterWeights(), logits, token_ids, token_mask)
    return _route(config, weights, logits, token_ids, token_mask, leading)


def _route(
    config: MoEConfig,
    weights: MoEWeights,
    logits: Tensor,
    token_ids: Tensor | None,
    token_mask: Tensor | None,
    leading: tuple[int, ...] | None = None,
) -> Routing:
    extra = weights.router or RouterWeights()
    if token_mask is not None:
        logits = torch.where(token_mask.unsqueeze(-1), logits, 0)
    if (
        runs("triton", config, logits)
        and extra.expert_scale is None
        and router_problem(config.json, logits.dtype) is None
        and not in_forward_mode()
    ):
        check_draft_export("route_top_k")
        chosen, ids = route_top_k_op(logits, extra.correction_bias, config.json)
        shared = None
    else:
        ids, chosen, shared = routing_weights(
            config, extra, logits, lambda z: SELECTIONS[config.router.selection](config, extra, z, token_ids)
        )
    routing = Routing(expert_ids=ids, weights=chosen, shared_weights=shared)
    routing = routing if token_mask is None else without_padding(routing, token_mask)
    return (
        routing
        if config.router.capacity is None
        else _within_capacity(config, routing, config.router.capacity, leading)
    )


def _within_capacity(config: MoEConfig, routing: Routing, capacity: int, leading: tuple[int, ...] | None) -> Routing:
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


def _weights_of_ids(config: MoEConfig, logits: Tensor, correction_bias: Tensor | None, ids: Tensor) -> Tensor:
    """Returns the routing weights of given expert ids, as a function of the logits."""
    extra = RouterWeights(correction_bias=correction_bias)
    return routing_weights(config, extra, logits, lambda z: (ids, top_k_weights(config, extra, z, ids)))[1]


route_top_k_op = define_route_top_k(_weights_of_ids)


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
