"""The record of a model family, one row of the family tables, and the keys that most families share.

A row is the one place of what is known of a family: its config's keys and their defaults, its block in transformers,
the names of its tensors in files.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_fn.families.config_class import ConfigClass
from moe_fn.families.keys import Key, Limit, Times, key
from moe_fn.families.tensor_names import TensorNames

# Activations by the names that configs use.
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

# Scoring functions by the names of transformers' activations, for families whose config selects one.
SCORINGS = {"sigmoid": "sigmoid", "sqrtsoftplus": "sqrtsoftplus"}

NUM_EXPERTS = key("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
TOP_K = key(".top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
HIDDEN = key("hidden_size", "d_model")
INTERMEDIATE = key("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_hidden_size")
WIDTH = key("intermediate_size")  # where experts are as wide as a dense layer
WIDTH_OF_SHARED = key("intermediate_size", kind="int")
NUM_SHARED = key("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", kind="int")
NORM_TOP_K = key(".norm_topk_prob", "norm_topk_prob", "moe_renormalize", kind="bool")
SCALE = key(
    ".routed_scaling_factor", ".route_scale", ".router_scaling_factor", "routed_scaling_factor", "route_scale",
    "router_scaling_factor", "moe_routed_scaling_factor", "moe_router_scaling_factor", kind="number",
)  # fmt: skip
ACT = key(
    ".act_fn", ".activation_fn", ".activation", "hidden_act", "hidden_activation", "activation_function",
    values=ACTIVATIONS,
)  # fmt: skip
LIMIT = Limit(key(".limit", ".swiglu_limit", "swiglu_limit", kind="number"))
ALPHA = key(".alpha", ".swiglu_alpha", "swiglu_alpha", kind="number")
RMS_EPSILON = key("rms_norm_eps", kind="number")

PLAIN: Mapping[str, Any] = {"act": ACT}
SILU: dict[str, Any] = {"function": "silu"}
CLAMPED: Mapping[str, Any] = {"act": ACT, "limit": LIMIT}
OAI: Mapping[str, Any] = {"function": "silu", "alpha": ALPHA, "limit": LIMIT, "up_offset": 1.0}

WIDTH_OF_EXPERT = dataclasses.replace(INTERMEDIATE, kind="int")
SHARED = Times(WIDTH_OF_EXPERT, NUM_SHARED)
SHARED_BY_SIZE = key("shared_expert_intermediate_size", kind="int")

# ConfigClass.renamed, where one name of the number of experts is another.
NUM_IS_LOCAL = {"num_experts": "num_local_experts"}
LOCAL_IS_NUM = {"num_local_experts": "num_experts"}
LOCAL_IS_ROUTED = {"num_local_experts": "n_routed_experts"}
UNREAD = ConfigClass()  # of families that are refused


@dataclass(frozen=True)
class Part:
    """A place in another model's config.json where the config of a model type is nested.

    model   model_type of the outer config
    path    keys that lead to the nested config
    named   names of modules that the part's tensors have in their path, and those of no other part; empty: all tensors
            without another part's name
    chosen  the nested config may have another model_type; this one is the default
    """

    model: str
    path: tuple[str, ...] = ("text_config",)
    named: tuple[str, ...] = ()
    chosen: bool = False


@dataclass(frozen=True)
class ModelType:
    """One model_type of a family.

    name    model_type in config.json, or in a config nested there
    blocks  class names of its MoE module in transformers
    files   how files name its tensors; the names in a file decide between several
    config  defaults and names of its config class in transformers
    inside  model types whose config nests this one
    """

    name: str
    blocks: tuple[str, ...]
    files: tuple[TensorNames, ...]
    config: ConfigClass
    inside: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Source:
    """The source of one tensor of MoEWeights in a live block.

    form   a row of `moe_fn.integrations.transformers.tensors.FORMS`
    names  names of the block's tensors ({e}: each expert in order)
    """

    form: str
    names: tuple[str, ...]


Sources = Mapping[str, tuple[Source, ...]]  # by dotted path in MoEWeights; the first whose tensors exist is used


def same(*alternatives: str, form: str = "identity") -> tuple[Source, ...]:
    """Sources of one tensor each, alternatives of one another."""
    return tuple(Source(form, (name,)) for name in alternatives)


def made(form: str, *names: str) -> tuple[Source, ...]:
    """One source of several tensors."""
    return (Source(form, names),)


@dataclass(frozen=True)
class LiveBlock:
    """Tensors and signature of a family's block in transformers; the default is (hidden) -> y with a router `gate`.

    tensors    sources that differ from the common ones, by path in MoEWeights
    router     name of the module whose output transformers records as router_logits
    logits_at  their index in the router's output
    stateful   whether the router passes a state from layer to layer; such a router is not replaced
    is_layer   whether the block is a whole decoder layer; only its router and experts are replaced
    returns    the output of the block, a key of `moe_fn.integrations.transformers.swapped.RETURNS`
    jitter     attributes of noise that the block adds to its input in training, which moe_forward does not
    """

    tensors: Sources = field(default_factory=dict)
    router: str = "gate"
    logits_at: int = 0
    stateful: bool = False
    is_layer: bool = False
    returns: str = "y"
    jitter: tuple[str, ...] = ("jitter_noise", "input_jitter_noise", "router.moe_jitter_eps", "router.jitter_noise")


ROUTER = LiveBlock(router="router")


@dataclass(frozen=True)
class Shared:
    """Shared experts: their width, and the fields of SharedExpertsConfig that differ from its defaults."""

    width: Any = SHARED
    gate: str = "none"
    combine: Any = "sum"
    activation: Mapping[str, Any] | None = None  # None: that of routed experts
    count: Any = 1  # how many the router weighs; elsewhere they are one wide expert


@dataclass(frozen=True)
class Family:
    """A family of models whose blocks compute the same. Options are constants or keys (`moe_fn.families.keys`).

    models      its model types
    router      fields of RouterConfig; "groups" is a mapping with the fields of GroupConfig
    activation  fields of ActivationConfig; "act" is the activation that the config names
    layer       other fields of MoEConfig: layouts, latent, zero experts, norms
    live        how its block is read and called
    refused     why moe_fn does not compute it; None where it does
    """

    models: tuple[ModelType, ...]
    router: Mapping[str, Any] = field(default_factory=dict)
    activation: Mapping[str, Any] = field(default_factory=lambda: PLAIN)
    shared: Shared | None = None
    layer: Mapping[str, Any] = field(default_factory=dict)
    live: LiveBlock = LiveBlock()
    num_experts: Key = NUM_EXPERTS
    top_k: Any = TOP_K
    hidden_size: Any = HIDDEN
    intermediate_size: Any = INTERMEDIATE
    refused: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Its values of model_type."""
        return tuple(model.name for model in self.models)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Class names of its blocks in transformers."""
        return tuple(block for model in self.models for block in model.blocks)
