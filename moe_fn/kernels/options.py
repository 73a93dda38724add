"""Which options the kernels of a back-end compute: tables from the fields of a config to the values that they know.

Each back-end has its tables in its own support.py. Options are listed, never excluded: a value or a field that a table
does not name is refused, so that a new option runs in torch's ops until a kernel has it.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Final

import torch

from moe_fn.config import MoEConfig, as_activation

ANY: Final = None  # every value: a number that the kernels read, or an option that acts outside of them
Known = Mapping[str, Collection[Any] | None]

# Fields of MoEConfig that act outside of dispatch, experts and combine, and sizes.
AROUND_EXPERTS: Known = dict.fromkeys(
    (
        "num_experts", "top_k", "hidden_size", "intermediate_size", "hidden_padding", "router", "shared", "latent",
        "zero_experts", "norms", "parallel", "chunk_tokens", "recompute", "backend", "opaque",
    )
)  # fmt: skip

# What both the C++ and the Triton kernels compute of MoEConfig and of ActivationConfig. What only one of them computes
# is a line in its own support.py.
FUSED_LAYER: Known = {
    **AROUND_EXPERTS,
    "gate_up_layout": ("packed", "interleaved"),
    "weight_layout": ("out_in", "in_out"),
    "batch_invariant": (False, True),
    "activation": ANY,  # the table of the activation
    "quant": ANY,  # the table of quantization
}
FUSED_ACTIVATION: Known = {
    "function": ("silu", "gelu", "gelu_tanh", "relu", "relu2", "situ"),
    "gated": (False, True),
    "limit": ANY,
    "limit_at": ("input", "output"),
    "alpha": ANY,
    "up_offset": ANY,
    "gate_cap": ANY,
    "up_cap": ANY,
}
# What both compute of RouterConfig and of GroupConfig.
FUSED_ROUTER: Known = {
    "scoring": ("softmax", "sigmoid", "sqrtsoftplus", "identity"),
    "scoring_order": ("before_top_k", "after_top_k"),
    "selection": ("top_k",),
    "correction_bias": ("none", "scores", "logits"),
    "groups": ANY,  # the table of groups
    "renormalize": (False, True),
    "renormalize_epsilon": ANY,
    "renormalize_minimum": ANY,
    "renormalize_order": (1.0, 2.0),
    "routed_scaling_factor": ANY,
    "scale_on": ("weights", "output", "output_float16_safe"),
    "logit_multiplier": ANY,
    "logit_softcap": ANY,
    # options of what comes before or after ids and weights
    **dict.fromkeys(("weight_on", "capacity", "gate_dtype", "gate_input", "score_dtype"), ANY),
}
FUSED_GROUPS: Known = {
    "count": ANY,
    "top_k": ANY,
    "score": ("max", "top2_sum"),
    "fill": ("-inf", "zero"),
    "limit": ("groups",),
}


def router_problem(
    kernels: str, config: MoEConfig, dtype: torch.dtype, dtypes: Collection[torch.dtype], router: Known, groups: Known
) -> str | None:
    """Why kernels with these tables do not route logits of dtype, in words; None if they do."""
    wrong = unknown_option(kernels, config.router, router)
    if wrong is None and config.router.groups is not None:
        wrong = unknown_option(kernels, config.router.groups, groups)
    if wrong is not None:
        return wrong
    score_dtype = config.router.score_dtype
    if dtype not in dtypes or (score_dtype != "float32" and dtype != torch.float32):
        return f"scores of {dtype} logits in score_dtype={score_dtype!r}; {kernels} compute in float32"
    if config.num_logits != config.num_choices:
        return f"weights of shared experts; {kernels} take logits of the routed experts alone"
    return None


def unknown_layer_option(kernels: str, config: MoEConfig, layer: Known, activation: Known) -> str | None:
    """The first option of a layer or of its activation that kernels do not know, in words; None if they know all."""
    return unknown_option(kernels, config, layer) or unknown_option(
        kernels, as_activation(config.activation), activation
    )


def unknown_option(kernels: str, config: Any, known: Known) -> str | None:
    """The first option of a config that kernels do not know, in words; None if they know all.

    A field that is not in `known` must have its default.

    >>> from moe_fn.config import RouterConfig
    >>> unknown_option("some kernels", RouterConfig(scoring="sigmoid"), {"scoring": ("softmax",)})
    "RouterConfig.scoring='sigmoid'; some kernels take 'softmax'"
    """
    for field in dataclasses.fields(config):
        value, values = getattr(config, field.name), known.get(field.name, (field.default,))
        if values is not ANY and value not in values:
            expected = " or ".join(map(repr, values))
            return f"{type(config).__name__}.{field.name}={value!r}; {kernels} take {expected}"
    return None
