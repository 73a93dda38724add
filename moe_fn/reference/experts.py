"""What one expert, and the shared experts, make of one token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fn.config import MoEConfig, SharedExpertsConfig, as_activation
from moe_fn.records import MoEWeights, SharedWeights
from moe_fn.reference.activation import activate
from moe_fn.reference.tensors import linear, needed, rms_norm


@dataclass(frozen=True, kw_only=True)
class Expert:
    """The weights of one expert: gate_up [gate_up, Hx] and down [Hx, I]."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    norm: Tensor | None


def experts_of_weights(config: MoEConfig, weights: MoEWeights) -> list[Expert]:
    """The experts one by one, as [out, in] matrices whatever the layout."""

    def one_by_one(tensor: Tensor | None) -> list[Tensor | None]:
        return [None] * config.num_experts if tensor is None else list(tensor.unbind(0))

    def matrices(tensor: Tensor) -> list[Tensor]:
        return [m.T if config.weight_layout == "in_out" else m for m in tensor.unbind(0)]

    columns = zip(
        matrices(weights.gate_up), matrices(weights.down), one_by_one(weights.gate_up_bias), one_by_one(weights.down_bias),
        one_by_one(weights.expert_norm), strict=True,
    )  # fmt: skip
    return [Expert(gate_up=a, down=b, gate_up_bias=c, down_bias=d, norm=e) for a, b, c, d, e in columns]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The low-rank matrices of one adapter for one expert: a [rank, in], b [out, rank] of each product, None where it has none."""

    gate_up_a: Tensor | None
    gate_up_b: Tensor | None
    down_a: Tensor | None
    down_b: Tensor | None


def adapter_of_expert(config: MoEConfig, weights: MoEWeights, adapter_id: int, expert_id: int) -> Adapter | None:
    """The matrices of an adapter for an expert; None for ids of no adapter. An expert dim of 1 is all experts'."""
    if config.lora is None or not 0 <= adapter_id < config.lora.num_adapters:
        return None
    lora = weights.lora
    if lora is None:
        raise ValueError("weights.lora is None; expected tensors, for the config asks for them")

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


def expert_output(config: MoEConfig, expert: Expert, v: Tensor, adapter: Adapter | None = None) -> Tensor:
    """One expert on one vector.

        o = down @ activation(gate_up @ v + gate_up_bias) + down_bias, then the expert norm if there is one

    With an adapter each matrix W is W + b @ a.

    v [Hx] float64 -> [Hx] float64. Source: semantics.md 3.1; the norm: Muse-Spark.

    >>> config = MoEConfig(num_experts=1, top_k=1, hidden_size=1, intermediate_size=1, activation="relu")
    >>> expert = Expert(gate_up=torch.tensor([[1.0], [5.0]]), down=torch.tensor([[2.0]]), gate_up_bias=None, down_bias=None, norm=None)
    >>> expert_output(config, expert, torch.tensor([3.0]))
    tensor([90.])
    """
    h = linear(expert.gate_up, v, expert.gate_up_bias)
    if adapter is not None:
        h = h + low_rank(adapter.gate_up_a, adapter.gate_up_b, v)
    a = activate(as_activation(config.activation), h, config.gate_up_layout)
    o = linear(expert.down, a, expert.down_bias)
    if adapter is not None:
        o = o + low_rank(adapter.down_a, adapter.down_b, a)
    if config.expert_norm is None:
        return o
    norm = needed(expert.norm, "weights.expert_norm")
    if config.expert_norm.scale == "before":
        return rms_norm(o * norm, config.expert_norm.epsilon)
    return rms_norm(o, config.expert_norm.epsilon) * norm


def shared_output(shared: SharedExpertsConfig, weights: SharedWeights, x: Tensor, shared_weights: Tensor | None) -> Tensor:
    """The shared experts on one token: a dense MLP of the original x.

        down @ (activation(gate_up @ x + gate_up_bias) * weight of each column) + down_bias, times sigmoid(x . gate) if gated so

    x [H], shared_weights [count] (where the router weighs them) -> [H]. Source: semantics.md 5.1 (Qwen2-MoE), Inkling.
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
