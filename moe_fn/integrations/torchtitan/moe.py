"""Converts torchtitan's MoE layer to a `MoEConfig` and `MoEWeights` for moe_forward, and its state dict both ways."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_fn.config import GroupConfig, MoEConfig, RouterConfig, SharedExpertsConfig
from moe_fn.integrations.torchtitan.layouts import config_of_experts, layout_of_class
from moe_fn.records import WEIGHT_PATHS, MoEWeights, Path, leaves_of_weights, weights_of_leaves

# Names in torchtitan's state_dict for each path of MoEWeights; two names are halves along dim -2 (biases: dim -1).
_AROUND: dict[Path, tuple[str, ...]] = {
    ("router", "gate"): ("router.gate.weight",),
    ("router", "bias"): ("router.gate.bias",),
    ("router", "correction_bias"): ("expert_bias_E",),
    ("shared", "gate_up"): ("shared_experts.w1.weight", "shared_experts.w3.weight"),
    ("shared", "gate_up_bias"): ("shared_experts.w1.bias", "shared_experts.w3.bias"),
    ("shared", "down"): ("shared_experts.w2.weight",),
    ("shared", "down_bias"): ("shared_experts.w2.bias",),
    ("shared", "gate"): ("shared_experts.gate.weight",),
}
_EXPERTS = "routed_experts.inner_experts."
_PLAIN: dict[Path, tuple[str, ...]] = {
    ("gate_up",): (f"{_EXPERTS}w1_EFD", f"{_EXPERTS}w3_EFD"),
    ("down",): (f"{_EXPERTS}w2_EDF",),
}
_GPT_OSS: dict[Path, tuple[str, ...]] = {
    ("gate_up",): (f"{_EXPERTS}mlp1_weight_EGD",),
    ("gate_up_bias",): (f"{_EXPERTS}mlp1_bias_EG",),
    ("down",): (f"{_EXPERTS}mlp2_weight_EDF",),
    ("down_bias",): (f"{_EXPERTS}mlp2_bias_ED",),
}


def router_config(router: Any, *, expert_bias: bool) -> RouterConfig:
    """The RouterConfig of a TokenChoiceTopKRouter, or of its Config; expert_bias: whether the layer has expert_bias_E.

    score_func is the scoring, route_norm the renormalization (+ 1e-20), route_scale the routed scaling factor,
    num_expert_groups and num_limited_groups the groups (sum of the two best scores, -inf outside). The gate is computed
    in float32, as in torchtitan on a GPU; on a CPU torch has no autocast to float32, and torchtitan computes it in the
    dtype of x. Raises ValueError for torchtitan's forced load balance, which is for benchmarks.

    >>> from types import SimpleNamespace
    >>> router = SimpleNamespace(score_func="sigmoid", route_norm=True, route_scale=2.5, num_expert_groups=8,
    ...     num_limited_groups=4)
    >>> router_config(router, expert_bias=True).groups
    GroupConfig(count=8, top_k=4, score='top2_sum', fill='-inf', limit='groups')
    """
    if getattr(router, "_debug_force_load_balance", False):
        raise ValueError(
            "router_config: router._debug_force_load_balance is True; expected False: it does not route by scores"
        )
    groups = None
    if router.num_expert_groups is not None:
        groups = GroupConfig(count=router.num_expert_groups, top_k=router.num_limited_groups, score="top2_sum")
    return RouterConfig(
        scoring=router.score_func,
        correction_bias="scores" if expert_bias else "none",
        groups=groups,
        renormalize=router.route_norm,
        renormalize_epsilon=1e-20 if router.route_norm else 0.0,
        routed_scaling_factor=router.route_scale,
    )


def config_of_moe(moe: Any) -> MoEConfig:
    """The MoEConfig of torchtitan's MoE module: experts, router, and shared experts with or without a sigmoid gate.

    Raises ValueError for unknown classes of experts or shared experts.
    """
    inner = moe.routed_experts.inner_experts
    layout = layout_of_class(type(inner))
    if layout is None:
        raise ValueError(
            f"config_of_moe: inner_experts is a {type(inner).__name__}; expected a class of LAYOUTS that is not "
            "replaced yet"
        )
    return dataclasses.replace(
        config_of_experts(layout, inner, top_k=moe.router.top_k),
        router=router_config(moe.router, expert_bias=moe.expert_bias_E is not None),
        shared=_shared_config(moe.shared_experts),
    )


def _shared_config(shared: Any) -> SharedExpertsConfig | None:
    if shared is None:
        return None
    kinds = {"FeedForward": "none", "SigmoidGatedFeedForward": "sigmoid"}
    kind = kinds.get(type(shared).__name__)
    if kind is None:
        raise ValueError(f"config_of_moe: shared_experts is a {type(shared).__name__}; expected one of {sorted(kinds)}")
    return SharedExpertsConfig(intermediate_size=shared.w1.weight.shape[0], gate=kind)  # type: ignore[arg-type]


def weights_of_state(state: Mapping[str, Tensor], prefix: str = "") -> MoEWeights:
    """The weights of one layer from torchtitan's state_dict, below a prefix such as "layers.1.moe.".

    w1 and w3 are concatenated to a new tensor; all other tensors are shared. state_of_weights is the inverse.
    Raises ValueError that names missing and unknown tensors below the prefix.
    """
    found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    experts = _GPT_OSS if any("mlp1" in name for name in found) else _PLAIN
    names = experts | _AROUND
    missing = [n for path in experts for n in names[path] if n not in found]
    missing += [n for pair in names.values() for n in pair if n not in found and any(other in found for other in pair)]
    surplus = sorted(set(found) - {n for pair in names.values() for n in pair})
    if missing or surplus:
        raise ValueError(
            f"weights_of_state: below {prefix!r} {sorted(set(missing))} are missing and {surplus} are unknown; "
            "expected the tensors of one layer"
        )

    def joined(path: Path) -> Tensor | None:
        parts = [found[name] for name in names.get(path, ()) if name in found]
        return None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts, _half_dim(path))

    return weights_of_leaves([joined(path) for path in WEIGHT_PATHS])


def state_of_weights(weights: MoEWeights, prefix: str = "") -> dict[str, Tensor]:
    """The inverse of weights_of_state: views of the weights by torchtitan's names; those of gpt-oss if gate_up has a
    bias.

    Raises ValueError for a weight that torchtitan's layer does not have.

    >>> state = state_of_weights(MoEWeights(gate_up=torch.ones(2, 6, 4), down=torch.ones(2, 4, 3)), "moe.")
    >>> state["moe.routed_experts.inner_experts.w3_EFD"].shape
    torch.Size([2, 3, 4])
    """
    names = (_PLAIN if weights.gate_up_bias is None else _GPT_OSS) | _AROUND
    state: dict[str, Tensor] = {}
    for path, leaf in zip(WEIGHT_PATHS, leaves_of_weights(weights), strict=True):
        if leaf is None:
            continue
        if path not in names:
            raise ValueError(f"state_of_weights: weights.{'.'.join(path)} is not in a torchtitan layer; expected None")
        parts = leaf.chunk(len(names[path]), _half_dim(path)) if len(names[path]) > 1 else (leaf,)
        state |= {prefix + name: part for name, part in zip(names[path], parts, strict=True)}
    return state


def _half_dim(path: Path) -> int:
    return -1 if path[-1].endswith("bias") else -2
