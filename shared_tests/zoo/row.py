"""A row of the zoo: one block of one model family, as data; and what running it yields."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

# What the router of a block returns, by the names of `zoo.run`'s readers
Routing = Literal["standard", "llama4", "dbrx", "jetmoe", "two_banks", "none"]
# What a block wants beside the hidden states, by the names of `zoo.run`'s callers
Takes = Literal["hidden", "input_ids", "router_states", "modality", "gemma_layer", "flat_output", "heads", "attention"]


@dataclass(frozen=True, eq=False)  # a row is itself: its mappings do not hash
class BlockRow:
    """One variant of one family's Mixture-of-Experts block.

    `options` are the config's arguments that make this variant, `sizes` the rest: rows of a family with equal sizes
    hold equal parameters for equal seeds, so options that matter show in the output. Classes are names, so that rows
    need no transformers.
    """

    table: str  # A softmax then top-k, B top-k then softmax, C sigmoid with groups, D sigmoid without, E other
    family: str  # directory in transformers.models
    variant: str
    config: str  # class in configuration_<family>
    block: str  # class in modeling_<family>
    sizes: Mapping[str, Any]
    options: Mapping[str, Any]
    subconfig: str = ""  # attribute of the config that the block is made with, where not the config itself
    args: tuple[int, ...] = ()  # what the block's constructor wants after the config, such as the layer's index
    path: str = ""  # the module within the block that is the row's, where not all of it
    router: str = "gate"  # the router within that module
    takes: Takes = "hidden"
    routing: Routing = "standard"
    # a variant with the same float32 numbers: the options that differ are ignored, or show in bfloat16
    same_numbers_as: str = ""
    idle: str = ""  # start of the names of tensors that the block holds and, in this variant, never reads
    refused: str = ""  # why this is no token-choice FFN MoE without drops; "" where it is one

    @property
    def name(self) -> str:
        return f"{self.family}-{self.variant}"

    @property
    def hidden_size(self) -> int:
        return int(self.sizes.get("hidden_size", self.sizes.get("d_model")))


@dataclass(frozen=True)
class BlockResult:
    """What a block adds to the residual, how its router chose, and the extra inputs it was given."""

    y: Tensor  # float32 [batch, seq, hidden]
    expert_ids: Tensor | None  # int64 [tokens, top_k]; None where the family has no such thing
    # float32 [tokens, top_k], as the router gives them, scaled on the weights where the family does
    weights: Tensor | None
    token_ids: Tensor | None = None  # int64 [batch, seq]: deepseek_v4's hash layers
    router_states: Tensor | None = None  # float32 [batch, seq, router_hidden]: zaya's previous layer
    modality: Tensor | None = None  # int64 [batch, seq], 1 is vision: ernie4_5_vl_moe
    # float32 [batch, seq, hidden]: gemma4's normed states, where the router reads x itself
    experts_input: Tensor | None = None
    after_norm: Tensor | None = None  # float32 [batch, seq, hidden]: y after the layer's own norm of it (gemma4)
    # whatever else the router returned: shared gammas, next states
    extras: Mapping[str, Tensor] = field(default_factory=dict)
