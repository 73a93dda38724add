"""Converts the arguments of vLLM's experts to those of moe_forward_routed, in pure functions without vLLM.

SGLang's runners have the same values under other names, so that the same function can be used (its source was read, it
was not run): `MoeRunnerCore.run(runner_input, quant_info, running_state)`, or a function registered with
`@register_fused_func`, would pass hidden_states of the dispatch output, topk_weights and topk_ids of its
StandardTopKOutput, w13_weight and w2_weight of quant_info as w1 and w2 with their biases, and from MoeRunnerConfig
activation (with "_no_mul" if is_gated is False), apply_router_weight_on_input, and gemm1_clamp_limit and gemm1_alpha as
options. routed_scaling_factor would be multiplied into topk_weights.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_fn.checks import checked_integers
from moe_fn.config import MoEConfig, RouterConfig
from moe_fn.config.activation import PRESETS, ActivationConfig
from moe_fn.config.parts import padding_experts
from moe_fn.records import MoEWeights, Routing

GateUpLayout = Literal["packed", "interleaved"]


@dataclass(frozen=True, kw_only=True)
class ActivationOptions:
    """The values of vLLM's ApplyMoEActivationConfig: parameters of some activations."""

    clamp_limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0
    activation_situ_beta: float | None = None
    activation_situ_linear_beta: float | None = None


@dataclass(frozen=True, kw_only=True)
class ExpertsCall:
    """The arguments of moe_forward_routed other than the tokens."""

    config: MoEConfig
    weights: MoEWeights
    routing: Routing


def _situ(o: ActivationOptions) -> ActivationConfig:
    linear = o.activation_situ_linear_beta
    cap = linear if linear is not None and linear > 0 else None  # vLLM's kernels take -1 for "none"
    return ActivationConfig(
        function="situ", gate_cap=_given("activation_situ_beta", o.activation_situ_beta), up_cap=cap
    )


def _uninterleaved(o: ActivationOptions) -> ActivationConfig:
    return ActivationConfig(limit=_given("clamp_limit", o.clamp_limit), alpha=o.alpha, up_offset=o.beta)


def _given(name: str, value: float | None) -> float:
    if value is None:
        raise ValueError(
            f"activation_of_name: options.{name} is None; expected a number: this activation has no default"
        )
    return value


def _preset(name: str) -> Callable[[ActivationOptions], ActivationConfig]:
    return lambda _: PRESETS[name]


# Values of vLLM's MoEActivation, as in apply_moe_activation; vLLM has "relu2_no_mul" but no "relu2".
ACTIVATIONS: dict[str, tuple[GateUpLayout, Callable[[ActivationOptions], ActivationConfig]]] = {
    "silu": ("packed", lambda o: ActivationConfig(limit=o.clamp_limit)),
    "gelu": ("packed", _preset("gelu")),
    "gelu_tanh": ("packed", _preset("gelu_tanh")),
    "situ": ("packed", _situ),
    "swigluoai": ("interleaved", _preset("swigluoai")),
    "swigluoai_uninterleave": ("packed", _uninterleaved),
    "swiglustep": ("packed", _preset("swiglustep")),
    "silu_no_mul": ("packed", _preset("silu_no_mul")),
    "gelu_no_mul": ("packed", _preset("gelu_no_mul")),
    "gelu_tanh_no_mul": ("packed", _preset("gelu_tanh_no_mul")),
    "relu2_no_mul": ("packed", _preset("relu2_no_mul")),
}


def activation_of_name(name: str, options: ActivationOptions | None = None) -> tuple[ActivationConfig, GateUpLayout]:
    """The activation of vLLM's name, and the layout of gates and ups in the columns of w1's product.

    Raises ValueError for a name that is not in ACTIVATIONS, and for a missing option that the activation needs.

    >>> activation_of_name("silu", ActivationOptions(clamp_limit=10.0))[0].limit
    10.0
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation_of_name: got {name!r}; expected one of {sorted(ACTIVATIONS)}")
    layout, make = ACTIVATIONS[name]
    return make(options or ActivationOptions()), layout


@functools.lru_cache
def config_of_sizes(
    *,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    activation: str,
    options: ActivationOptions | None = None,
) -> MoEConfig:
    """The config of a layer that is routed by the host; cached, because every call needs it.

    A rank may have fewer experts than top_k: experts on other ranks are choices that add nothing.

    >>> config_of_sizes(num_experts=2, top_k=8, hidden_size=4, intermediate_size=4, activation="silu").num_choices
    8
    """
    function, layout = activation_of_name(activation, options)
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        router=RouterConfig(renormalize=False),
        activation=function,
        gate_up_layout=layout,
        zero_experts=padding_experts(num_experts, top_k),
    )


def call_of_arguments(
    config: MoEConfig,
    *,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
) -> ExpertsCall:
    """The arguments of FusedMoEExpertsModular.apply as those of `moe_forward_routed(config, weights, hidden_states,
    routing)`.

    w1 [E, N, K] and w2 [E, K, I] of this rank's experts, N = 2 I or I; topk_weights and topk_ids [M, topk]; expert_map
    [all experts]: the index on this rank of each expert, -1 for experts of other ranks. Slots of those, and of ids -1,
    add nothing. With apply_router_weight_on_input the host has multiplied hidden_states already, and the weights are
    taken as 1.

    The arguments are not checked here; moe_forward_routed checks them.

    >>> config = config_of_sizes(num_experts=2, top_k=2, hidden_size=4, intermediate_size=4, activation="silu")
    >>> w1, w2, ids = torch.ones(2, 8, 4), torch.ones(2, 4, 4), torch.tensor([[0, 3], [1, 2]])
    >>> here = torch.tensor([-1, -1, 0, 1])  # experts 2 and 3
    >>> call_of_arguments(config, w1=w1, w2=w2, topk_weights=torch.ones(2, 2), topk_ids=ids,
    ...     expert_map=here).routing.expert_ids.tolist()
    [[-1, 1], [-1, 0]]
    """
    weights = MoEWeights(gate_up=w1, down=w2, gate_up_bias=w1_bias, down_bias=w2_bias)
    ids = topk_ids if expert_map is None else _local(topk_ids, expert_map)
    used = torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights
    return ExpertsCall(config=config, weights=weights, routing=Routing(expert_ids=ids, weights=used))


def _local(topk_ids: Tensor, expert_map: Tensor) -> Tensor:
    topk_ids, expert_map = (
        checked_integers("call_of_arguments", *named) for named in (("topk_ids", topk_ids), ("expert_map", expert_map))
    )
    known = (topk_ids >= 0) & (topk_ids < expert_map.shape[0])
    places = expert_map.index_select(0, torch.where(known, topk_ids, 0).flatten()).view_as(topk_ids)
    return torch.where(known, places, -1)
