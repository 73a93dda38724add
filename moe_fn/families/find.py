"""The family of a layer, by its config.json or by the class of its block, and the part of a config.json that describes
the layer: a model of several parts nests a config for each, and its tensors' names have the part's name.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from moe_fn.families.config_class import ConfigClass, ConfigValues
from moe_fn.families.others import OTHERS
from moe_fn.families.row import Family, Part
from moe_fn.families.sigmoid import WITH_GROUPS, WITHOUT_GROUPS
from moe_fn.families.softmax import AFTER_TOP_K, BEFORE_TOP_K

FAMILIES: tuple[Family, ...] = BEFORE_TOP_K + AFTER_TOP_K + WITH_GROUPS + WITHOUT_GROUPS + OTHERS
_OF_NAME = {name: family for family in FAMILIES for name in family.names}
_OF_BLOCK = {name: family for family in FAMILIES for name in family.blocks}
CONFIG_CLASSES: Mapping[str, ConfigClass] = {
    model.name: model.config for family in FAMILIES if not family.refused for model in family.models
}


def _parts_of_models() -> dict[str, tuple[tuple[str, Part], ...]]:
    parts: dict[str, tuple[tuple[str, Part], ...]] = {}
    for model in (model for family in FAMILIES for model in family.models):
        for part in model.inside:
            parts[part.model] = (*parts.get(part.model, ()), (model.name, part))
    return parts


# Outer model_type -> the model types of its parts and where they are, the language model first: families come in this
# order.
PARTS: Mapping[str, tuple[tuple[str, Part], ...]] = _parts_of_models()
# Names of the language model's config in its outer config, in the order in which they are tried
_TEXT_CONFIGS = ("text_config", "language_config", "llm_config", "thinker_config")
_DEPTH = 4  # levels of nested configs that are searched


def family_of_block(class_name: str) -> Family:
    """Returns the row of a class of transformers' blocks. Raises ValueError for an unknown class."""
    if class_name not in _OF_BLOCK:
        raise ValueError(
            f"{class_name} is not the block of a known family; expected one of {', '.join(sorted(_OF_BLOCK))}"
        )
    return _OF_BLOCK[class_name]


def family_of_part(model_config: ConfigValues, prefix: str | None) -> tuple[Family, str, ConfigValues]:
    """Returns the family, the model_type and the values of the part of a config.json that describes a layer.

    prefix: the prefix of the layer's tensors. Raises ValueError for an unknown model_type.
    """
    model_type, values = part_of_layer(model_config, prefix)
    if model_type not in _OF_NAME:
        raise ValueError(f"model_type is {model_type}; expected one of {', '.join(sorted({*_OF_NAME, *PARTS}))}")
    return _OF_NAME[model_type], model_type, values


def part_of_layer(model_config: ConfigValues, prefix: str | None = None) -> tuple[str, ConfigValues]:
    """Returns the model_type and the values of the part of a config.json that describes a layer, by the prefix of its
    tensors.

    Without a prefix it is the language model. The nested configs of an unknown model are searched for a known
    model_type; where none has one, the result names the unknown model types. Raises ValueError for a prefix of no part.
    """
    outer = model_config.get("model_type")
    if isinstance(outer, str) and outer in PARTS:
        model_type, part = _part_of_prefix(PARTS[outer], prefix)
        values = _nested_config(model_config, part.path)
        own = values.get("model_type")
        return (own if part.chosen and isinstance(own, str) and own not in PARTS else model_type), values
    if isinstance(outer, str) and outer in _OF_NAME:
        return outer, model_config
    found = list(_known_configs(model_config))
    if not found:
        types = ([repr(outer)] if outer is not None else []) + [repr(name) for name in _model_types(model_config)]
        return " or ".join(types) or "missing", {}
    names = (prefix or "").split(".")
    _, nested = next(
        (entry for entry in found if any(name.removesuffix("_config") in names for name in entry[0])), found[0]
    )
    return part_of_layer(nested, prefix)


def _part_of_prefix(parts: tuple[tuple[str, Part], ...], prefix: str | None) -> tuple[str, Part]:
    if prefix is None:
        return parts[0]
    names = prefix.split(".")
    found = [entry for entry in parts if any(name in names for name in entry[1].named)] or [
        entry for entry in parts if not entry[1].named
    ]
    if not found:
        expected = " or ".join(repr(name) for _, part in parts for name in part.named)
        raise ValueError(
            f"the model has {len(parts)} parts with experts, and {prefix!r} is in none of them; expected {expected} in "
            "it"
        )
    return found[0]


def _nested_config(model_config: ConfigValues, path: tuple[str, ...]) -> ConfigValues:
    """Returns the config at a path; the text config may have an older name, or be the whole file."""
    values: Any = model_config
    for name in path:
        names = _TEXT_CONFIGS[:3] if path == ("text_config",) else (name,)
        inner = next(
            (values[other] for other in names if values.get(other) is not None), model_config if len(names) > 1 else {}
        )
        if not isinstance(inner, Mapping):
            raise ValueError(f"{name} is {inner!r:.80} in the model's config; expected a JSON object")
        values = inner
    return values  # type: ignore[no-any-return]


def _known_configs(model_config: ConfigValues, depth: int = _DEPTH) -> Iterator[tuple[tuple[str, ...], ConfigValues]]:
    """Yields the path and the values of each nested config of a known model_type, language models first."""
    order = sorted(
        model_config, key=lambda name: _TEXT_CONFIGS.index(name) if name in _TEXT_CONFIGS else len(_TEXT_CONFIGS)
    )
    for name in order:
        inner = model_config[name]
        if isinstance(inner, Mapping):
            own = inner.get("model_type")
            if isinstance(own, str) and (own in _OF_NAME or own in PARTS):
                yield (name,), inner
            elif depth:
                yield from (((name, *path), values) for path, values in _known_configs(inner, depth - 1))


def _model_types(model_config: ConfigValues, depth: int = _DEPTH) -> Iterator[str]:
    for inner in model_config.values():
        if isinstance(inner, Mapping):
            if isinstance(inner.get("model_type"), str):
                yield inner["model_type"]
            yield from _model_types(inner, depth - 1) if depth else ()
