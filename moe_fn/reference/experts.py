"""Reference output of one expert, and of the shared experts, for one token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fn.config import MoEConfig, SharedExpertsConfig, as_activation
from moe_fn.records import MoEWeights, QuantWeights, SharedWeights
from moe_fn.reference.activation import activate
from moe_fn.reference.quant import matrices as quant_matrices
from moe_fn.reference.quant import rounded
from moe_fn.reference.tensors import linear, needed, rms_norm


@dataclass(frozen=True, kw_only=True)
class Expert:
    """The weights of one expert: gate_up [gate_up, Hx] and down [Hx, I]."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    norm: Tensor | None
    gate_up_input_scale: Tensor | None = None  # [] static scales of inputs
    down_input_scale: Tensor | None = None


def experts_of_weights(config: MoEConfig, weights: MoEWeights) -> list[Expert]:
    """The weights of each expert, as [out, in] matrices in any weight_layout."""

    def by_expert(tensor: Tensor | None) -> list[Tensor | None]:
        return [None] * config.num_experts if tensor is None else list(tensor.unbind(0))

    def matrices(name: str) -> list[Tensor]:
        if config.quant is not None:
            return quant_matrices(config, weights, name)
        return [m.T if config.weight_layout == "in_out" else m for m in getattr(weights, name).unbind(0)]

    quant = weights.quant or QuantWeights()
    columns = zip(
        matrices("gate_up"), matrices("down"), by_expert(weights.gate_up_bias), by_expert(weights.down_bias),
        by_expert(weights.expert_norm), by_expert(quant.gate_up_input_scale), by_expert(quant.down_input_scale),
        strict=True,
    )  # fmt: skip
    return [
        Expert(gate_up=a, down=b, gate_up_bias=c, down_bias=d, norm=e, gate_up_input_scale=f, down_input_scale=g)
        for a, b, c, d, e, f, g in columns
    ]


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """Parameters of a call for the rounding of inputs: largest absolute inputs of gate_up and down, where one scale is
    shared by all rows.
    """

    gate_up_amax: float | None = None
    down_amax: float | None = None
    single: bool = True  # scales in float32


def rounded_input(config: MoEConfig, expert: Expert, name: str, v: Tensor, rounding: Rounding) -> Tensor:
    """The input of gate_up or down, rounded by config.quant.activations."""
    if config.quant is None or config.quant.activations is None:
        return v
    static = getattr(expert, f"{name}_input_scale")
    return rounded(
        config.quant.activations,
        v,
        static_scale=None if static is None else float(static),
        amax_of_call=getattr(rounding, f"{name}_amax"),
        single=rounding.single,
    )


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The low-rank matrices of one adapter for one expert: a [rank, in] and b [out, rank] of each product, or None."""

    gate_up_a: Tensor | None
    gate_up_b: Tensor | None
    down_a: Tensor | None
    down_b: Tensor | None


def adapter_of_expert(config: MoEConfig, weights: MoEWeights, adapter_id: int, expert_id: int) -> Adapter | None:
    """The matrices of an adapter for an expert; None for ids without an adapter.

    A tensor whose expert dim is 1 is shared by all experts.
    """
    if config.lora is None or not 0 <= adapter_id < config.lora.num_adapters:
        return None
    lora = weights.lora
    if lora is None:
        raise ValueError("weights.lora is None; expected tensors, since config.lora is given")

    def of_expert(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[adapter_id][0 if len(tensor[adapter_id]) == 1 else expert_id]

    return Adapter(
        gate_up_a=of_expert(lora.gate_up_a),
        gate_up_b=of_expert(lora.gate_up_b),
        down_a=of_expert(lora.down_a),
        down_b=of_expert(lora.down_b),
    )


def low_rank(a: Tensor | None, b: Tensor | None, v: Tensor) -> Tensor | float:
    """b @ (a @ v), or 0."""
    return 0.0 if a is None or b is None else b @ (a @ v)


def hidden_of_expert(
    config: MoEConfig, expert: Expert, v: Tensor, adapter: Adapter | None, rounding: Rounding | None = None
) -> Tensor:
    """The input of an expert's second product, before rounding: v [Hx] -> [I]."""
    h = linear(expert.gate_up, rounded_input(config, expert, "gate_up", v, rounding or Rounding()), expert.gate_up_bias)
    if adapter is not None:
        h = h + low_rank(adapter.gate_up_a, adapter.gate_up_b, v)
    return activate(as_activation(config.activation), h, config.gate_up_layout)


def expert_output(
    config: MoEConfig, expert: Expert, v: Tensor, adapter: Adapter | None = None, rounding: Rounding | None = None
) -> Tensor:
    """The output of one expert for one vector.

        o = down @ activation(gate_up @ v + gate_up_bias) + down_bias, then the expert norm if configured

    With an adapter each matrix W is W + b @ a.

    v [Hx] float64 -> [Hx] float64. Source: vLLM's Triton experts; the norm: Muse-Spark.

    >>> config = MoEConfig(num_experts=1, top_k=1, hidden_size=1, intermediate_size=1, activation="relu")
    >>> expert = Expert(gate_up=torch.tensor([[1.0], [5.0]]), down=torch.tensor([[2.0]]), gate_up_bias=None,
    ...     down_bias=None, norm=None)
    >>> expert_output(config, expert, torch.tensor([3.0]))
    tensor([90.])
    """
    a = hidden_of_expert(config, expert, v, adapter, rounding)
    o = linear(expert.down, rounded_input(config, expert, "down", a, rounding or Rounding()), expert.down_bias)
    if adapter is not None:
        o = o + low_rank(adapter.down_a, adapter.down_b, a)
    if config.expert_norm is None:
        return o
    norm = needed(expert.norm, "weights.expert_norm")
    if config.expert_norm.scale == "before":
        return rms_norm(o * norm, config.expert_norm.epsilon)
    return rms_norm(o, config.expert_norm.epsilon) * norm


def shared_output(
    shared: SharedExpertsConfig, weights: SharedWeights, x: Tensor, shared_weights: Tensor | None
) -> Tensor:
    """The output of the shared experts for one token: a dense MLP of the original x.

        down @ (activation(gate_up @ x + gate_up_bias) * weight of each column) + down_bias, times sigmoid(x . gate) if
        shared.gate is "sigmoid"

    x [H], shared_weights [count] (if shared.gate is "router") -> [H]. Source: Qwen2-MoE, Inkling.
    """
    h = linear(weights.gate_up, x, weights.gate_up_bias)
    a = activate(as_activation(shared.activation), h)
    if shared.gate == "router":
        of_expert = needed(shared_weights, "routing.shared_weights")
        a = a * torch.cat([of_expert[i].expand(shared.intermediate_size) for i in range(shared.count)])
    y = linear(weights.down, a, weights.down_bias)
    if shared.gate == "sigmoid":
        y = y * torch.sigmoid(needed(weights.gate, "weights.shared.gate")[0] @ x)
    return y
