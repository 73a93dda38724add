"""What a row of the family tables says, and the words that most families share."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_fn.families.words import Limit, Times, Word, word

# Activations by the names that configs use for them.
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "silu": {"function": "silu"},
    "swish": {"function": "silu"},
    "gelu": {"function": "gelu"},
    "gelu_python": {"function": "gelu"},
    "gelu_pytorch_tanh": {"function": "gelu_tanh"},
    "gelu_python_tanh": {"function": "gelu_tanh"},
    "gelu_new": {"function": "gelu_tanh"},
    "quick_gelu": {"function": "silu", "alpha": 1.702},
    "relu": {"function": "relu"},
    "relu2": {"function": "relu2"},
}

# Scores by the names of transformers' activations, for families that let the config choose.
SCORINGS = {"sigmoid": "sigmoid", "sqrtsoftplus": "sqrtsoftplus"}

NUM_EXPERTS = word("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
TOP_K = word(
    ".top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"
)
HIDDEN = word("hidden_size", "d_model")
INTERMEDIATE = word("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_hidden_size")
WIDTH = word("intermediate_size")  # where experts are as wide as a dense layer
WIDTH_OF_SHARED = word("intermediate_size", kind="whole")
NUM_SHARED = word("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", kind="whole")
NORM_TOP_K = word(".norm_topk_prob", "norm_topk_prob", "moe_renormalize", kind="flag")
SCALE = word(
    ".routed_scaling_factor", ".route_scale", ".router_scaling_factor", "routed_scaling_factor", "route_scale",
    "router_scaling_factor",
    "moe_routed_scaling_factor", "moe_router_scaling_factor", kind="number",
)  # fmt: skip
ACT = word(
    ".act_fn", ".activation_fn", ".activation", "hidden_act", "hidden_activation", "activation_function",
    values=ACTIVATIONS,
)  # fmt: skip
LIMIT = Limit(word(".limit", ".swiglu_limit", "swiglu_limit", kind="number"))
ALPHA = word(".alpha", ".swiglu_alpha", "swiglu_alpha", kind="number")

PLAIN: Mapping[str, Any] = {"act": ACT}
SILU: dict[str, Any] = {"function": "silu"}
CLAMPED: Mapping[str, Any] = {"act": ACT, "limit": LIMIT}
OAI: Mapping[str, Any] = {"function": "silu", "alpha": ALPHA, "limit": LIMIT, "up_offset": 1.0}

WIDTH_OF_EXPERT = dataclasses.replace(INTERMEDIATE, kind="whole")
SHARED = Times(WIDTH_OF_EXPERT, NUM_SHARED)
SHARED_BY_SIZE = word("shared_expert_intermediate_size", kind="whole")


@dataclass(frozen=True)
class Shared:
    """Shared experts: their width, and the fields of SharedExpertsConfig that differ from its defaults."""

    width: Any = SHARED
    gate: str = "none"
    combine: Any = "sum"
    activation: Mapping[str, Any] | None = None  # None: as the routed ones
    count: Any = 1  # how many the router weighs; elsewhere they are one wide expert


@dataclass(frozen=True)
class Family:
    """One family of models: how its config becomes a MoEConfig. Values are constants or words
    (`moe_fn.families.words`).

    names       values of model_type in config.json, with those of nested text configs
    blocks      class names of its layers in transformers
    router      fields of RouterConfig; "groups" a mapping of fields of GroupConfig
    activation  fields of ActivationConfig; "act" stands for what the config calls it
    layer       further fields of MoEConfig: layouts, latent, zero experts, norms
    refused     why it is no token-choice mixture of feed-forward experts, or cannot be had as one
    """

    names: tuple[str, ...]
    blocks: tuple[str, ...] = ()
    router: Mapping[str, Any] = field(default_factory=dict)
    activation: Mapping[str, Any] = field(default_factory=lambda: PLAIN)
    shared: Shared | None = None
    layer: Mapping[str, Any] = field(default_factory=dict)
    num_experts: Word = NUM_EXPERTS
    top_k: Any = TOP_K
    hidden_size: Any = HIDDEN
    intermediate_size: Any = INTERMEDIATE
    refused: str | None = None
