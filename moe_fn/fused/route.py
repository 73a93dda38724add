"""route: logits to Routing, by the stage in torch's ops or by one op where a kernel computes the router.

Why an op: `moe_fn.ops.route_top_k`.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from moe_fn.backends import runs
from moe_fn.config import MoEConfig, config_of_json
from moe_fn.kernels.native import call as native
from moe_fn.kernels.native import support as on_cpu
from moe_fn.kernels.triton import call as gpu
from moe_fn.kernels.triton import support as on_gpu
from moe_fn.ops.define import Kernel
from moe_fn.ops.route_top_k import define_route_top_k
from moe_fn.records import MoEWeights, RouterWeights, Routing
from moe_fn.stages._checks import check_routing_inputs
from moe_fn.stages._routing_weights import without_padding
from moe_fn.stages.route import choose_experts, weights_of_ids, within_capacity
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
    op = _op_of(config, extra, logits)
    if op is not None:
        check_draft_export("route_top_k")
        chosen, ids = op(logits, extra.correction_bias, config.json)
        routing = Routing(expert_ids=ids, weights=chosen)
    else:
        routing = choose_experts(config, extra, logits, token_ids)
    routing = routing if token_mask is None else without_padding(routing, token_mask)
    capacity = config.router.capacity
    return routing if capacity is None else within_capacity(config, routing, capacity, leading)


def _op_of(config: MoEConfig, extra: RouterWeights, logits: Tensor) -> Kernel | None:
    """The op that computes this call, if there is one. An op has no scales of experts and no forward mode."""
    if extra.expert_scale is not None or in_forward_mode():
        return None
    for backend, op in BY_OP.items():
        if runs(backend, config, logits) and ROUTER_PROBLEMS[backend](config.json, logits.dtype) is None:
            return op
    return None


def _in_torch(logits: Tensor, correction_bias: Tensor | None, config: str) -> tuple[Tensor, Tensor]:
    routing = choose_experts(config_of_json(config), RouterWeights(correction_bias=correction_bias), logits, None)
    return routing.weights.to(torch.float32), routing.expert_ids


native_op = define_route_top_k("native", functools.partial(native.run, "route_top_k", _in_torch), weights_of_ids)
triton_op = define_route_top_k("triton", functools.partial(gpu.run, "route_top_k"), weights_of_ids)

BY_OP: dict[str, Kernel] = {"native": native_op, "triton": triton_op}
ROUTER_PROBLEMS: dict[str, Callable[[str, torch.dtype], str | None]] = {
    "native": on_cpu.router_problem,
    "triton": on_gpu.router_problem,
}
