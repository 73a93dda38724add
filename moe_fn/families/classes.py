"""From a config.json to the words that transformers' config class makes of it: its defaults, other names, older words,
one layer's own.
"""

import math
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_fn.families.words import MISSING, NULL

Words = Mapping[str, Any]
# JSON has none of them: transformers writes {"__float__": name}
_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def as_written(words: Words, layer: int) -> Words:
    """Nothing is written otherwise."""
    return {}


@dataclass(frozen=True)
class ConfigClass:
    """What a config class of transformers knows of a Mixture-of-Experts layer: only words that a family's row reads.

    defaults  of every word, in the order of the class's fields, for a later one overwrites an earlier one of the same
              meaning; MISSING where a config.json has to say it
    renamed   other names of words, by the names that the rows read
    nullable  words that may be null; of any other, null is an error
    older     what words of older files change, defaults filled in: (words, layer) -> words
    """

    defaults: Words
    renamed: Mapping[str, str] = field(default_factory=dict)
    nullable: tuple[str, ...] = ()
    older: Callable[[Words, int], Words] = as_written


def words_of_layer(config_class: ConfigClass, model_config: Words, layer: int) -> Words:
    """Every word of a class for one layer: what the file says, else the default. Words that the class does not know are
    left out.

    As transformers has it: fields first, then other names, which therefore win, then what per_layer_config says of the
    layer. Of a list the layer's own entry is taken. Raises ValueError for a list that is too short, for a
    per_layer_config that is no mapping, and for null beside another name of the same word.
    """
    fields, renamed = config_class.defaults, config_class.renamed
    other_names = {*renamed, *renamed.values()} - {*fields}
    words: Words = ChainMap(model_config, fields)  # type: ignore[arg-type]  # it is only read
    changed = config_class.older(words, layer)
    given = [(name, changed[name] if name in changed else words[name]) for name in fields]
    given += [(name, model_config[name]) for name in model_config if name in other_names]
    found: dict[str, Any] = {}
    for name, value in (*given, *_own_words(words, layer).items()):
        if name in fields or name in other_names:
            wanted = name in fields and name not in config_class.nullable
            found[renamed.get(name, name)] = NULL if value is None and wanted else value
    for name, value in given:
        other = found[renamed.get(name, name)]
        if value is None and name in fields and name not in config_class.nullable and other is not NULL:
            raise ValueError(f"{name} is None in the model's config; expected {other!r:.80}, as another name has it")
    return {name: _of_layer(name, _plain(value), layer) for name, value in found.items() if value is not MISSING}


def _own_words(words: Words, layer: int) -> Words:
    """What per_layer_config says of a layer; its keys are numbers, in JSON with zeros before them."""
    said = words.get("per_layer_config")
    all_layers: Any = {} if said is None else said
    is_numbered = isinstance(all_layers, Mapping) and all(str(key).isdecimal() for key in all_layers)
    if not is_numbered or not all(isinstance(value, Mapping) for value in all_layers.values()):
        raise ValueError(
            f"per_layer_config is {said!r:.80} in the model's config; expected the words of layers, by their numbers"
        )
    return next((own for key, own in all_layers.items() if int(key) == layer), {})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        return _FLOATS.get(value["__float__"], value)
    return value


def _of_layer(name: str, value: Any, layer: int) -> Any:
    if not isinstance(value, list | tuple):
        return value
    if not 0 <= layer < len(value):
        raise ValueError(f"{name} has {len(value)} entries; expected one for layer {layer}")
    return value[layer]
