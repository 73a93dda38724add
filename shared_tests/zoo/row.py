"""A row of the zoo, which describes one block of one model family as data, and the result of running the block."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

# Format of the router's output: a reader in `zoo.run`
Routing = Literal["standard", "llama4", "dbrx", "jetmoe", "two_banks", "none"]
# Arguments of the block: a caller in `zoo.run`
Takes = Literal["hidden", "input_ids", "router_states", "modality", "gemma_layer", "flat_output", "heads", "attention"]


@dataclass(frozen=True, eq=False)  # compared by identity: mappings have no hash
class BlockRow:
    """One variant of one family's Mixture-of-Experts block.

    `options` are the config's arguments that differ between variants, `sizes` the others: rows of a family with equal
    sizes have equal parameters for equal seeds, so that an option that has an effect changes the output. Classes are
    given by name, so that rows do not import transformers.
    """

    table: str  # A softmax then top-k, B top-k then softmax, C sigmoid with groups, D sigmoid without, E other
    family: str  # directory in transformers.models
    variant: str
    config: str  # class in configuration_<family>
    block: str  # class in modeling_<family>
    sizes: Mapping[str, Any]
    options: Mapping[str, Any]
    subconfig: str = ""  # attribute of the config that the block's constructor takes; "": the config itself
    args: tuple[int, ...] = ()  # arguments of the block's constructor after the config, such as the layer's index
    path: str = ""  # the row's module within the block; "": the block
    router: str = "gate"  # the router within that module
    takes: Takes = "hidden"
    routing: Routing = "standard"
    # a variant with the same float32 output: the options that differ are ignored, or have an effect in bfloat16 only
    same_numbers_as: str = ""
    idle: str = ""  # prefix of the names of tensors that this variant of the block never reads
    refused: str = ""  # why it is not a token-choice FFN MoE without drops; "": it is one

    @property
    def name(self) -> str:
        return f"{self.family}-{self.variant}"

    @property
    def hidden_size(self) -> int:
        return int(self.sizes.get("hidden_size", self.sizes.get("d_model")))


@dataclass(frozen=True)
class BlockResult:
    """The output of a block, the choice of its router, and the extra inputs of the call."""

    y: Tensor  # float32 [batch, seq, hidden]
    expert_ids: Tensor | None  # int64 [tokens, top_k]; None if the family has none
    # float32 [tokens, top_k], as the router returns them, scaled if the family scales its weights
    weights: Tensor | None
    token_ids: Tensor | None = None  # int64 [batch, seq]: deepseek_v4's hash layers
    router_states: Tensor | None = None  # float32 [batch, seq, router_hidden]: zaya's previous layer
    modality: Tensor | None = None  # int64 [batch, seq], 1 is vision: ernie4_5_vl_moe
    # float32 [batch, seq, hidden]: gemma4's normalized states, whose router reads x
    experts_input: Tensor | None = None
    after_norm: Tensor | None = None  # float32 [batch, seq, hidden]: y after the layer's norm (gemma4)
    # other outputs of the router: shared gammas, next states
    extras: Mapping[str, Tensor] = field(default_factory=dict)
