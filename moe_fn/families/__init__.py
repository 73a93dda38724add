"""Every published family as a row of data: how its config's words become a MoEConfig.

`moe_fn.integrations.transformers` reads live blocks by these rows, `moe_fn.checkpoint` reads config.json. A new family
is a row, and what its config class puts where a file says nothing (`moe_fn.families.defaults`).
"""

from collections.abc import Mapping
from typing import Any

from moe_fn.config import MoEConfig
from moe_fn.families.build import build_activation, build_config
from moe_fn.families.choices import check_choices
from moe_fn.families.classes import ConfigClass, words_of_layer
from moe_fn.families.composite import PARTS, part_of_layer
from moe_fn.families.defaults import CONFIG_CLASSES
from moe_fn.families.others import OTHERS
from moe_fn.families.row import Family
from moe_fn.families.sigmoid import WITH_GROUPS, WITHOUT_GROUPS
from moe_fn.families.softmax import AFTER_TOP_K, BEFORE_TOP_K
from moe_fn.families.words import MISSING, NULL

__all__ = [
    "FAMILIES",
    "Family",
    "build_activation",
    "build_config",
    "config_of_layer",
    "family_of_block",
    "family_of_config",
]

FAMILIES: tuple[Family, ...] = BEFORE_TOP_K + AFTER_TOP_K + WITH_GROUPS + WITHOUT_GROUPS + OTHERS
_OF_NAME = {name: family for family in FAMILIES for name in family.names}
_OF_BLOCK = {name: family for family in FAMILIES for name in family.blocks}


def family_of_block(class_name: str) -> Family:
    """The row of a class of transformers' blocks. Raises ValueError for one that is not known."""
    if class_name not in _OF_BLOCK:
        raise ValueError(
            f"{class_name} is not the block of a family that is known; expected one of {', '.join(sorted(_OF_BLOCK))}"
        )
    return _OF_BLOCK[class_name]


def family_of_config(model_config: Mapping[str, Any], prefix: str | None = None) -> Family:
    """The row of a parsed config.json, by its model_type or that of a config nested in it. Raises ValueError for one
    that is not known.

    prefix: what the names of a layer's tensors begin with, for models of several parts; None: the language model.
    """
    return _part(model_config, prefix)[0]


def config_of_layer(model_config: Mapping[str, Any], layer: int, prefix: str | None = None) -> MoEConfig:
    """The MoEConfig of one layer of a model, from its parsed config.json alone.

    Words that the file leaves out are what transformers' config class of the model puts there
    (`moe_fn.families.defaults`). Values that are lists hold one entry a layer. Which layers are mixtures of experts at
    all, the tensors say, not the config. prefix: what the names of the layer's tensors begin with, such as
    "talker.model.layers.3.mlp". A model of several parts with experts (Qwen3-Omni's thinker and talker) has words for
    each. None: its language model's.

    Raises ValueError for an unknown or refused family, a word that is missing or null where the class has no default, a
    prefix of no part of the model, and a value that this version does not know.

    Laws
        A word is read as its class reads it.
        A layer is read with the words of its part.
        A word that names a function is never read as another.

    >>> words = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64,
    ...     "intermediate_size": 128}
    >>> config_of_layer(words, 0).num_experts
    8
    """
    family, model_type, part = _part(model_config, prefix)
    if family.refused:
        raise ValueError(
            f"{family.names[0]}: {family.refused}; expected a token-choice mixture of feed-forward experts"
        )
    words: Mapping[str, Any] = {}
    try:
        words = words_of_layer(CONFIG_CLASSES[model_type], part, layer)
        config = build_config(family, lambda name: words.get(name, MISSING), sizes={})
    except (TypeError, OverflowError, AttributeError) as error:
        kind = (
            f"{family.names[0]}: the model's config has null, or a value of another kind than this family's models have"
        )
        raise ValueError(f"{kind} ({error}); expected what transformers writes") from error
    except ValueError as error:
        if "the model's config" in str(error) or not words:
            raise
        raise ValueError(f"{error}{_sources(CONFIG_CLASSES[model_type], part)}") from error
    for name, value in words.items():  # of words that this layer has no use for
        if value is NULL:
            raise ValueError(f"{name} is None in the model's config; expected a value, or no such word")
    check_choices(family, config, part)
    return config


def _sources(config_class: ConfigClass, part: Mapping[str, Any]) -> str:
    """For an error: the words of a layer that a file says, and those that it leaves out with what the class
    puts there.
    """
    known = {*config_class.defaults, *config_class.renamed, *config_class.renamed.values()}
    said = {name: value for name, value in part.items() if name in known}
    meant = {config_class.renamed.get(name, name) for name in said}
    left_out = {
        name: value
        for name, value in config_class.defaults.items()
        if config_class.renamed.get(name, name) not in meant and value is not MISSING
    }
    titles = {"read from the model's config": said, "left out, and so the default of its class": left_out}
    return "".join(
        f"; {title}: {', '.join(f'{name} ({value!r:.40})' for name, value in words.items())}"
        for title, words in titles.items()
        if words
    )


def _part(model_config: Mapping[str, Any], prefix: str | None) -> tuple[Family, str, Mapping[str, Any]]:
    model_type, words = part_of_layer(model_config, _OF_NAME, prefix)
    if model_type not in _OF_NAME:
        raise ValueError(f"model_type is {model_type}; expected one of {', '.join(sorted({*_OF_NAME, *PARTS}))}")
    return _OF_NAME[model_type], model_type, words
