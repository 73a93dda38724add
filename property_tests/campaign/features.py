"""The features of a problem: option -> value, as strings, for counting pairs of options."""

import dataclasses

from torch import Tensor

from moe_fn.config import ActivationConfig, ActivationName, MoEConfig, QuantConfig
from moe_fn.testing import MoEProblem

Features = dict[str, str]
_ROUTER = (
    "selection", "scoring", "scoring_order", "correction_bias", "renormalize", "renormalize_epsilon",
    "renormalize_minimum",
    "renormalize_order", "routed_scaling_factor", "scale_on", "logit_multiplier", "logit_softcap",
    "sparsemixer_epsilon", "weight_on",
    "gate_dtype", "score_dtype", "gate_input",
)  # fmt: skip
_LAYER = ("gate_up_layout", "weight_layout", "chunk_tokens", "backend", "opaque", "batch_invariant")


def features_of(problem: MoEProblem) -> Features:
    """Returns the value of each option of a problem; configs and tensors are given by their kind."""
    config, tokens = problem.config, problem.x[..., 0].numel()
    words = {name: str(getattr(config.router, name)) for name in _ROUTER} | {
        name: str(getattr(config, name)) for name in _LAYER
    }
    return (
        {
            "dtype": str(problem.x.dtype).removeprefix("torch."),
            "tokens": "0" if tokens == 0 else "1" if tokens == 1 else "2-7" if tokens < 8 else "8-17",
            "dims": "flat" if problem.x.ndim == 2 else "batch",
            "padding": "none"
            if problem.token_mask is None
            else "all"
            if not bool(problem.token_mask.any())
            else "some",
            "inputs of size": size_of(problem.x),
            "logits": "gate" if problem.logits is None else "given",
            "biases": str(problem.weights.gate_up_bias is not None),
        }
        | words
        | _parts(config)
        | _quant(config.quant)
    )


def size_of(x: Tensor) -> str:
    """Returns the magnitude of inputs as a word."""
    largest = float(x.abs().nan_to_num(posinf=0.0).max()) if x.numel() else 0.0
    return "0" if largest == 0 else "small" if largest < 0.1 else "near 1" if largest <= 4 else "large"


def _parts(config: MoEConfig) -> Features:
    groups, shared, norms = config.router.groups, config.shared, config.norms
    seen = () if norms is None else (name for name in ("input", "gate", "output") if getattr(norms, name))
    return {
        "activation": name_of(config.activation),
        "groups": "None" if groups is None else groups.limit,
        "capacity": "None" if config.router.capacity is None else "some",
        "zero_experts": "None" if config.zero_experts is None else config.zero_experts.kind,
        "shared": "None" if shared is None else shared.gate,
        "latent": "None" if config.latent is None else "latent",
        "expert_norm": "None" if config.expert_norm is None else config.expert_norm.scale,
        "norms": "None" if norms is None else "+".join(seen),
        "lora": "None" if config.lora is None else config.lora.experts,
        "hidden_padding": "0" if config.hidden_padding == 0 else "some",
    }


def _quant(quant: QuantConfig | None) -> Features:
    if quant is None:
        return {
            "quant": "None",
            "quant granularity": "None",
            "zero_points": "False",
            "inputs": "None",
            "inputs granularity": "None",
        }
    inputs = quant.activations
    return {
        "quant": quant.scheme,
        "quant granularity": quant.granularity,
        "zero_points": str(quant.zero_points),
        "inputs": "None" if inputs is None else inputs.scheme,
        "inputs granularity": "None" if inputs is None else f"{inputs.granularity}{' static' if inputs.static else ''}",
    }


def name_of(activation: ActivationConfig | ActivationName) -> str:
    """Returns a preset's name, or the function and its fields that are not the default.

    >>> name_of(ActivationConfig(limit=0.5)), name_of("relu2")
    ('silu limit', 'relu2')
    """
    if not isinstance(activation, ActivationConfig):
        return activation
    names = [f.name for f in dataclasses.fields(activation) if f.name not in ("function", "limit_at", "gate_cap")]
    default = ActivationConfig(function=activation.function, gate_cap=activation.gate_cap)
    return " ".join(
        [activation.function, *(name for name in names if getattr(activation, name) != getattr(default, name))]
    )
