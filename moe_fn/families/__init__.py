"""Published model families as rows of data: how a model's config becomes a MoEConfig, how its block and files are read.

A new family is one row (`moe_fn.families.row.Family`) in softmax.py, sigmoid.py or others.py, by its router.
`moe_fn.integrations.transformers` reads live blocks by these rows, `moe_fn.checkpoint` reads files.
"""

from collections.abc import Mapping
from typing import Any

from moe_fn.config import MoEConfig
from moe_fn.families.build import build_activation, build_config, check_choices
from moe_fn.families.config_class import ConfigClass, values_of_layer
from moe_fn.families.find import CONFIG_CLASSES, FAMILIES, family_of_block, family_of_part
from moe_fn.families.keys import MISSING, NULL
from moe_fn.families.row import Family

__all__ = [
    "FAMILIES",
    "Family",
    "build_activation",
    "build_config",
    "config_of_layer",
    "family_of_block",
    "family_of_config",
]


def family_of_config(model_config: Mapping[str, Any], prefix: str | None = None) -> Family:
    """Returns the row of a parsed config.json, by its model_type or that of a nested config.

    prefix: the prefix of a layer's tensors, for models of several parts; None: the language model. Raises ValueError
    for an unknown model_type.
    """
    return family_of_part(model_config, prefix)[0]


def config_of_layer(model_config: Mapping[str, Any], layer: int, prefix: str | None = None) -> MoEConfig:
    """Returns the MoEConfig of one layer of a model, from its parsed config.json alone.

    Keys that the file does not have take the defaults of the model's config class in transformers. A list has one
    entry for each layer. Which layers are mixtures of experts is known from the tensors, not from the config.
    prefix: the prefix of the layer's tensors, such as "talker.model.layers.3.mlp", for models of several parts with
    experts (Qwen3-Omni's thinker and talker), which have a config each. None: the language model's config.

    Raises ValueError for an unknown or refused family, a key that is missing or null and has no default, a prefix of no
    part of the model, and a value that this version does not know.

    Laws
        A key is read as its class reads it.
        A layer is read with the values of its part.
        A key that names a function is never read as another.

    >>> model = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64,
    ...     "intermediate_size": 128}
    >>> config_of_layer(model, 0).num_experts
    8
    """
    family, model_type, part = family_of_part(model_config, prefix)
    if family.refused:
        raise ValueError(
            f"{family.names[0]}: {family.refused}; expected a token-choice mixture of feed-forward experts"
        )
    values: Mapping[str, Any] = {}
    try:
        values = values_of_layer(CONFIG_CLASSES[model_type], part, layer)
        config = build_config(family, lambda name: values.get(name, MISSING), sizes={})
    except (TypeError, OverflowError, AttributeError) as error:
        where = (
            f"{family.names[0]}: the model's config has null, or a value of another type than this family's configs "
            "have"
        )
        raise ValueError(f"{where} ({error}); expected what transformers writes") from error
    except ValueError as error:
        if "the model's config" in str(error) or not values:
            raise
        raise ValueError(f"{error}{_sources(CONFIG_CLASSES[model_type], part)}") from error
    for name, value in values.items():  # keys that this layer does not use
        if value is NULL:
            raise ValueError(f"{name} is None in the model's config; expected a value, or no such key")
    check_choices(family, config, part)
    return config


def _sources(config_class: ConfigClass, part: Mapping[str, Any]) -> str:
    """Returns, for an error, the keys of a layer that a file has, and the defaults of those that it does not have."""
    known = {*config_class.defaults, *config_class.renamed, *config_class.renamed.values()}
    given = {name: value for name, value in part.items() if name in known}
    names = {config_class.renamed.get(name, name) for name in given}
    defaults = {
        name: value
        for name, value in config_class.defaults.items()
        if config_class.renamed.get(name, name) not in names and value is not MISSING
    }
    titles = {"the model's config has": given, "defaults of its class": defaults}
    return "".join(
        f"; {title}: {', '.join(f'{name} ({value!r:.40})' for name, value in values.items())}"
        for title, values in titles.items()
        if values
    )
