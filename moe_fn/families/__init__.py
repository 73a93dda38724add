"""Every published family as a row of data: how its config's words become a MoEConfig.

`moe_fn.integrations.transformers` reads live blocks by these rows, `moe_fn.checkpoint` reads config.json. A new family is a row.
"""

from collections.abc import Mapping
from typing import Any

from moe_fn.config import MoEConfig
from moe_fn.families.build import build_activation, build_config
from moe_fn.families.others import OTHERS
from moe_fn.families.row import Family
from moe_fn.families.sigmoid import WITH_GROUPS, WITHOUT_GROUPS
from moe_fn.families.softmax import AFTER_TOP_K, BEFORE_TOP_K
from moe_fn.families.words import MISSING, Look

__all__ = ["FAMILIES", "Family", "build_activation", "build_config", "config_of_layer", "family_of_block", "family_of_config"]

FAMILIES: tuple[Family, ...] = BEFORE_TOP_K + AFTER_TOP_K + WITH_GROUPS + WITHOUT_GROUPS + OTHERS
_OF_NAME = {name: family for family in FAMILIES for name in family.names}
_OF_BLOCK = {name: family for family in FAMILIES for name in family.blocks}
_NESTED = ("text_config", "ffn_config", "llm_config", "thinker_config", "language_config")


def family_of_block(class_name: str) -> Family:
    """The row of a class of transformers' blocks. Raises ValueError for one that is not known."""
    if class_name not in _OF_BLOCK:
        raise ValueError(f"{class_name} is not the block of a family that is known; expected one of {', '.join(sorted(_OF_BLOCK))}")
    return _OF_BLOCK[class_name]


def family_of_config(model_config: Mapping[str, Any]) -> Family:
    """The row of a parsed config.json, by its model_type or that of a config nested in it. Raises ValueError for one that is not known."""
    types = [str(part["model_type"]) for part in _parts(model_config) if "model_type" in part]
    for name in types:
        if name in _OF_NAME:
            return _OF_NAME[name]
    raise ValueError(f"model_type is {' or '.join(map(repr, types)) or 'missing'}; expected one of {', '.join(sorted(_OF_NAME))}")


def config_of_layer(model_config: Mapping[str, Any], layer: int) -> MoEConfig:
    """The MoEConfig of one layer of a model, from its parsed config.json alone.

    Values that are lists hold one entry a layer. Which layers are mixtures of experts at all, the tensors say, not the config.

    Raises ValueError for an unknown or refused family, a missing word, or a value that this version does not know.

    >>> words = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64, "intermediate_size": 128}
    >>> config_of_layer(words, 0).num_experts
    8
    """
    family = family_of_config(model_config)
    try:
        return build_config(family, _look_in(model_config, layer), sizes={})
    except (TypeError, OverflowError) as error:
        kind = f"{family.names[0]}: the model's config has null, or a value of another kind than this family's models have"
        raise ValueError(f"{kind} ({error}); expected what transformers writes") from error


def _look_in(model_config: Mapping[str, Any], layer: int) -> Look:
    def look(name: str) -> Any:
        for part in _parts(model_config):
            if name in part and not name.startswith("."):
                value = part[name]
                value = value["name"] if isinstance(value, Mapping) and "name" in value else value
                return _of_layer(name, value, layer)
        return MISSING

    return look


def _of_layer(name: str, value: Any, layer: int) -> Any:
    if not isinstance(value, list):
        return value
    if not 0 <= layer < len(value):
        raise ValueError(f"{name} has {len(value)} entries; expected one for layer {layer}")
    return value[layer]


def _parts(model_config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Nested configs first: a multimodal model says its own sizes outside, those of its language model inside."""
    inner = [model_config[name] for name in _NESTED if isinstance(model_config.get(name), Mapping)]
    return [part for nested in inner for part in _parts(nested)] + [model_config]
