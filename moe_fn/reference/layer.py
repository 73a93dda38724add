"""Reference layer, one token at a time."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.records import LatentWeights, MoEWeights, RouterWeights, Routing, leaves_of_weights
from moe_fn.reference.experts import (
    Adapter,
    Expert,
    Rounding,
    adapter_of_expert,
    expert_output,
    experts_of_weights,
    hidden_of_expert,
    shared_output,
)
from moe_fn.reference.routing import route_comparing_in
from moe_fn.reference.tensors import float64_weights, is_real, linear, needed, rms_norm, stack_rows, zero_of


def moe_forward(
    config: MoEConfig,
    weights: MoEWeights,
    x: Tensor,
    logits: Tensor | None = None,
    *,
    token_ids: Tensor | None = None,
    token_mask: Tensor | None = None,
    adapter_ids: Tensor | None = None,
) -> Tensor:
    """The layer: the sum of the outputs of each token's top_k experts, weighted by the router.

        y_t = sum over slots (e, w) of w * expert_e(x_t)  + shared experts + zero experts

    x [..., H] and logits [..., num_logits] of any float dtype (without logits: x @ router.gate.T + router.bias),
    token_ids [...] ints for hash routing, token_mask [...] bool, False for padding, whose result is 0, adapter_ids
    [...] ints, the LoRA adapter of each token (None: 0) -> [..., H] float64.
    Source: Shazeer et al. 2017 (arXiv 1701.06538); order of operations: vLLM's MoE runner.

    >>> config = MoEConfig(num_experts=2, top_k=1, hidden_size=1, intermediate_size=1, activation="relu_no_mul")
    >>> weights = MoEWeights(gate_up=torch.ones(2, 1, 1), down=torch.tensor([[[10.0]], [[20.0]]]))
    >>> moe_forward(config, weights, torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0, 5.0], [5.0, 0.0]])).tolist()
    [[20.0], [20.0]]
    """
    if logits is None:  # scores are compared as if logits had x's dtype
        logits, logits_dtype = gate_logits(config, float64_weights(weights), x, token_mask), x.dtype
        logits = logits.reshape(*x.shape[:-1], config.num_logits)
    else:
        logits_dtype = logits.dtype
    routing = route_comparing_in(logits_dtype, config, weights, logits, token_ids, token_mask)
    routing = Routing(
        expert_ids=routing.expert_ids,
        weights=routing.weights,
        shared_weights=routing.shared_weights,
        adapter_ids=adapter_ids,
    )
    return moe_forward_routed(config, weights, x, routing, token_mask=token_mask)


def moe_forward_routed(
    config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing, *, token_mask: Tensor | None = None
) -> Tensor:
    """The layer after routing: `moe_forward` for a given routing.

        y_t = sum over slots (e, w) of w * expert_e(x_t)  + shared experts + zero experts

    x [..., H], routing.expert_ids and .weights [T, top_k] (slots with ids that are no expert's add nothing),
    token_mask [...] bool -> [..., H] float64.

    >>> config = MoEConfig(num_experts=1, top_k=1, hidden_size=1, intermediate_size=1, activation="relu_no_mul")
    >>> weights = MoEWeights(gate_up=torch.ones(1, 1, 1), down=torch.ones(1, 1, 1))
    >>> routing = Routing(expert_ids=torch.tensor([[0], [-1]]), weights=torch.tensor([[0.5], [0.5]]))
    >>> moe_forward_routed(config, weights, torch.tensor([[3.0], [3.0]]), routing).tolist()
    [[1.5], [0.0]]
    """
    weights64 = float64_weights(weights)
    experts = experts_of_weights(config, weights64)
    rows = x.to(torch.float64).reshape(-1, config.hidden_size).unbind(0)
    slots = slots_of_tokens(config, routing)
    real_of_token = is_real(token_mask, len(rows))
    rounding = rounding_of_call(
        config,
        weights64,
        experts,
        [p for p, real in zip(zip(rows, slots, strict=True), real_of_token, strict=True) if real],
        x.dtype,
    )
    outputs = []
    for row, slots_of_row, real in zip(rows, slots, real_of_token, strict=True):
        if real:
            outputs.append(
                token_output(
                    config, weights64, experts, row, slots_of_row, rounding, is_float16=x.dtype == torch.float16
                )
            )
        else:  # padding is not read: it may have any values
            outputs.append(row.new_zeros(config.hidden_size))
    zero = zero_of(x, routing.weights, routing.shared_weights, *leaves_of_weights(weights))
    return (stack_rows(outputs, config.hidden_size, zero) + zero).reshape(*x.shape[:-1], config.hidden_size)


@dataclass(frozen=True, kw_only=True)
class Slots:
    """The routing of one token: top_k ids, weights [top_k] and shared_weights [shared experts] in float64, LoRA
    adapter.
    """

    ids: list[int]
    weights: Tensor
    shared_weights: Tensor | None
    adapter: int = 0


def slots_of_tokens(config: MoEConfig, routing: Routing) -> list[Slots]:
    """The routing of each token."""
    ids = routing.expert_ids.reshape(-1, config.top_k).tolist()
    weights = routing.weights.to(torch.float64).reshape(-1, config.top_k).unbind(0)
    adapters = [0] * len(ids) if routing.adapter_ids is None else routing.adapter_ids.reshape(-1).tolist()
    shared: Sequence[Tensor | None] = [None] * len(ids)
    if routing.shared_weights is not None:
        shared = routing.shared_weights.to(torch.float64).reshape(-1, routing.shared_weights.shape[-1]).unbind(0)
    tokens = zip(ids, weights, shared, adapters, strict=True)
    return [Slots(ids=i, weights=w, shared_weights=s, adapter=a) for i, w, s, a in tokens]


def gate_logits(config: MoEConfig, weights: MoEWeights, x: Tensor, token_mask: Tensor | None) -> Tensor:
    """The router's logits gate @ v + bias, where v is the original x or the routed input.

    x [..., H] -> [T, num_logits] float64.
    """
    router = weights.router or RouterWeights()
    gate = needed(router.gate, "weights.router.gate")
    rows = x.to(torch.float64).reshape(-1, config.hidden_size).unbind(0)
    logits = []
    for row, real in zip(rows, is_real(token_mask, len(rows)), strict=True):
        if not real:
            logits.append(row.new_zeros(config.num_logits))
        elif config.router.gate_input == "transformed":
            logits.append(linear(gate, routed_input(config, weights, row), router.bias))
        else:
            v = rms_norm(row, config.norms.epsilon) if config.norms is not None and config.norms.gate else row
            logits.append(linear(gate, v, router.bias))
    zero = zero_of(x, gate, router.bias)
    return stack_rows(logits, config.num_logits, zero) + zero


def rounding_of_call(
    config: MoEConfig,
    weights: MoEWeights,
    experts: list[Expert],
    tokens: list[tuple[Tensor, Slots]],
    dtype: torch.dtype,
) -> Rounding:
    """Largest absolute inputs of both products over all rows, where activations are rounded with one scale per call."""
    single = dtype != torch.float64
    activations = None if config.quant is None else config.quant.activations
    if activations is None or activations.granularity != "tensor" or activations.static:
        return Rounding(single=single)
    every = [
        visit
        for x, slots in tokens
        for visit in visits(config, weights, experts, routed_input(config, weights, x), slots)
    ]
    first = Rounding(
        gate_up_amax=max((float(visit.v.detach().abs().max()) for visit in every), default=0.0), single=single
    )
    hidden = [hidden_of_expert(config, visit.expert, visit.v, visit.adapter, first) for visit in every]
    return dataclasses.replace(first, down_amax=max((float(a.detach().abs().max()) for a in hidden), default=0.0))


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One slot of a token that has an expert: the expert, its adapter, its input v, and the weight of its output."""

    expert: Expert
    adapter: Adapter | None
    v: Tensor
    weight: Tensor | float


def visits(config: MoEConfig, weights: MoEWeights, experts: list[Expert], v: Tensor, slots: Slots) -> list[Visit]:
    """The slots (e, w) of one token that have an expert: input v and weight w; with weight_on="input", input w * v and
    weight 1.
    """
    found = []
    for expert_id, weight in zip(slots.ids, slots.weights.unbind(0), strict=True):
        if not 0 <= expert_id < config.num_experts:
            continue  # no expert (-1), or a zero expert
        on_input = config.router.weight_on == "input"
        adapter = adapter_of_expert(config, weights, slots.adapter, expert_id)
        inputs, factor = (weight * v, 1.0) if on_input else (v, weight)
        found.append(Visit(expert=experts[expert_id], adapter=adapter, v=inputs, weight=factor))
    return found


def token_output(
    config: MoEConfig,
    weights: MoEWeights,
    experts: list[Expert],
    x: Tensor,
    slots: Slots,
    rounding: Rounding,
    *,
    is_float16: bool,
) -> Tensor:
    """The output of the layer for one token: x [H] -> [H]."""
    v = routed_input(config, weights, x)
    # without the zeros of hidden_padding
    y = routed_sum(config, weights, experts, v, slots, rounding)[: config.routed_size]
    factor, scale_on = config.router.routed_scaling_factor, config.router.scale_on
    scale_shared = scale_on == "output_float16_safe" and is_float16 and config.shared is not None
    if scale_on != "weights" and not scale_shared:
        y = y * factor
    y = routed_output(config, weights, y)
    if config.shared is not None:
        if weights.shared is None:
            raise ValueError("weights.shared is None; expected weights, since config.shared is given")
        shared = shared_output(config.shared, weights.shared, x, slots.shared_weights)
        y = y + (shared / factor if scale_shared else shared)
        if config.shared.combine == "average":
            y = y / 2
    y = y + zero_experts(config, weights, x, slots)
    if config.norms is not None and config.norms.output:
        y = rms_norm(y, config.norms.epsilon) * needed(weights.output_norm, "weights.output_norm")
    return y


def routed_input(config: MoEConfig, weights: MoEWeights, x: Tensor) -> Tensor:
    """The experts' input: x, normalized and projected to the latent space as configured, with hidden_padding zeros.

    x [H] -> [Hx].
    """
    v = x
    if config.norms is not None and config.norms.input:
        v = rms_norm(v, config.norms.epsilon) * needed(weights.input_norm, "weights.input_norm")
    if config.latent is not None:
        latent = latent_weights(weights)
        v = linear(latent.input, v, latent.input_bias)
        if latent.input_norm is not None:
            v = rms_norm(v, config.latent.norm_epsilon) * latent.input_norm
    return torch.cat([v, v.new_zeros(config.hidden_padding)])


def routed_sum(
    config: MoEConfig, weights: MoEWeights, experts: list[Expert], v: Tensor, slots: Slots, rounding: Rounding
) -> Tensor:
    """Sum over slots of weight * expert(input): v [Hx] -> [Hx]."""
    total = torch.zeros_like(v)
    for visit in visits(config, weights, experts, v, slots):
        total = total + visit.weight * expert_output(config, visit.expert, visit.v, visit.adapter, rounding)
    return total


def routed_output(config: MoEConfig, weights: MoEWeights, y: Tensor) -> Tensor:
    """Projection of the experts' sum from the latent space, if any: y [L or H] -> [H]."""
    if config.latent is None:
        return y
    latent = latent_weights(weights)
    if latent.output_norm is not None:
        y = rms_norm(y, config.latent.norm_epsilon) * latent.output_norm
    return linear(latent.output, y, latent.output_bias)


def zero_experts(config: MoEConfig, weights: MoEWeights, x: Tensor, slots: Slots) -> Tensor:
    """Sum over the slots of zero experts: w * x, 0, or w * constant. x [H] -> [H].

    Source: LongCat-Flash (identity), MoNE (constant).
    """
    total = torch.zeros_like(x)
    if config.zero_experts is None:
        return total
    for expert_id, weight in zip(slots.ids, slots.weights.unbind(0), strict=True):
        if not config.num_experts <= expert_id < config.num_choices:
            continue
        if config.zero_experts.kind == "identity":
            total = total + weight * x
        elif config.zero_experts.kind == "constant":
            total = total + weight * needed(weights.constants, "weights.constants")[expert_id - config.num_experts]
    return total


def latent_weights(weights: MoEWeights) -> LatentWeights:
    """The latent projections, or a ValueError."""
    if weights.latent is None:
        raise ValueError("weights.latent is None; expected weights, since config.latent is given")
    return weights.latent
