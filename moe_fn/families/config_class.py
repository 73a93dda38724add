"""Values that transformers' config class derives from a config.json for one layer: defaults, other names of a key, keys
of older files, values of single layers.
"""

import math
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_fn.families.keys import MISSING, NULL

ConfigValues = Mapping[str, Any]  # the values of a config by key
# JSON has no such numbers: transformers writes {"__float__": name}
_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_HASH_LAYERS = 3  # DeepSeek-V4's default, where a file has neither num_hash_layers nor mlp_layer_types
# experts in the layers of dots3_note's vision tower; -1 is a dense layer
_PYRAMID = [-1] * 25 + list(range(4, 65, 4)) + [64]


def unchanged(values: ConfigValues, layer: int) -> ConfigValues:
    """Files of all ages have the same keys."""
    return {}


@dataclass(frozen=True)
class ConfigClass:
    """The part of a config class of transformers that describes a Mixture-of-Experts layer: keys that a row reads.

    defaults  default by key, in the order of the class's fields: of two names of a key, the later one wins. MISSING:
              the class has no default
    renamed   other names of keys (attribute_map): other name -> name that the rows read
    nullable  keys that may be null; null for another key is an error
    older     a function that converts keys of older files: (values with defaults, layer) -> values that change
    """

    defaults: ConfigValues = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    nullable: tuple[str, ...] = ()
    older: Callable[[ConfigValues, int], ConfigValues] = unchanged


def values_of_layer(config_class: ConfigClass, model_config: ConfigValues, layer: int) -> ConfigValues:
    """Returns the values of a layer by key: from the file, else the default. Keys that the class does not have are
    dropped.

    The order is transformers': fields, then other names, which therefore win, then per_layer_config's entry of the
    layer. A list becomes the layer's element. Raises ValueError for a list that is too short, for a per_layer_config
    that is not a mapping, and for null next to another name of the same key.
    """
    fields, renamed = config_class.defaults, config_class.renamed
    other_names = {*renamed, *renamed.values()} - {*fields}
    values: ConfigValues = ChainMap(model_config, fields)  # type: ignore[arg-type]  # never written
    changed = config_class.older(values, layer)
    given = [(name, changed[name] if name in changed else values[name]) for name in fields]
    given += [(name, model_config[name]) for name in model_config if name in other_names]
    found: dict[str, Any] = {}
    for name, value in (*given, *_values_of_one_layer(values, layer).items()):
        if name in fields or name in other_names:
            required = name in fields and name not in config_class.nullable
            found[renamed.get(name, name)] = NULL if value is None and required else value
    for name, value in given:
        other = found[renamed.get(name, name)]
        if value is None and name in fields and name not in config_class.nullable and other is not NULL:
            raise ValueError(
                f"{name} is None in the model's config; expected {other!r:.80}, the value under its other name"
            )
    return {name: _element(name, _decode_float(value), layer) for name, value in found.items() if value is not MISSING}


def _values_of_one_layer(values: ConfigValues, layer: int) -> ConfigValues:
    """Returns per_layer_config's entry of a layer; its keys are layer numbers, in JSON with leading zeros."""
    given = values.get("per_layer_config")
    all_layers: Any = {} if given is None else given
    is_numbered = isinstance(all_layers, Mapping) and all(str(name).isdecimal() for name in all_layers)
    if not is_numbered or not all(isinstance(value, Mapping) for value in all_layers.values()):
        raise ValueError(
            f"per_layer_config is {given!r:.80} in the model's config; expected an object of keys for each layer"
        )
    return next((own for name, own in all_layers.items() if int(name) == layer), {})


def _decode_float(value: Any) -> Any:
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        return _FLOATS.get(value["__float__"], value)
    return value


def _element(name: str, value: Any, layer: int) -> Any:
    if not isinstance(value, list | tuple):
        return value
    if not 0 <= layer < len(value):
        raise ValueError(f"{name} has {len(value)} entries; expected one for layer {layer}")
    return value[layer]


# Functions for ConfigClass.older: (values with defaults, layer) -> values that change.


def _get(values: ConfigValues, name: str, default: Any) -> Any:
    """Returns the value of a key that may be absent and may not be null."""
    value = values.get(name, default)
    if value is None and name in values:
        raise ValueError(f"{name} is None in the model's config; expected a number")
    return value


def hash_or_moe_layer(values: ConfigValues, layer: int) -> ConfigValues:
    """DeepSeek-V4: the first num_hash_layers layers choose experts by token id, unless mlp_layer_types lists the
    layers.
    """
    if values["mlp_layer_types"] is not None:
        return {}
    count = values.get("num_hash_layers")
    count = _HASH_LAYERS if count is None else count
    if type(count) is not int:
        raise ValueError(f"num_hash_layers is {count!r:.80} in the model's config; expected an int")
    return {"mlp_layer_types": "hash_moe" if layer < count else "moe"}


def number_of_experts(values: ConfigValues, layer: int) -> ConfigValues:
    """DeepSeek-V3.2 and families like it: num_experts is n_routed_experts."""
    count = values.get("num_experts")
    return {} if count is None else {"n_routed_experts": count}


def width_of_experts(values: ConfigValues, layer: int) -> ConfigValues:
    """Inkling: with a dense_intermediate_size, intermediate_size is the width of experts."""
    if values.get("dense_intermediate_size") is None:
        return {}
    return {"moe_intermediate_size": values["intermediate_size"]}


def scale_or_one(values: ConfigValues, layer: int) -> ConfigValues:
    """MiMo-V2-Flash: the published file has null for a scale of 1."""
    return {"routed_scaling_factor": 1.0} if values["routed_scaling_factor"] is None else {}


def width_of_shared(values: ConfigValues, layer: int) -> ConfigValues:
    """dots3_note: moe_shared_expert_intermediate_size is shared_experts_intermediate_size."""
    name = "shared_experts_intermediate_size"
    return {name: _get(values, "moe_shared_expert_intermediate_size", values[name])}


def limits_or_none(values: ConfigValues, layer: int) -> ConfigValues:
    """Step: an empty list limits no layer."""
    return {name: None for name in ("swiglu_limits", "swiglu_limits_shared") if values[name] == []}


def refuse_shared_of_width_0(values: ConfigValues, layer: int) -> ConfigValues:
    """Hy3 and Nemotron-H: shared experts of width 0 are as wide as a dense layer in transformers, and absent in other
    tools.
    """
    for name in ("num_shared_experts", "moe_shared_expert_intermediate_size"):
        if values.get(name) == 0:
            raise ValueError(
                f"{name} is 0 in the model's config; expected at least 1: transformers and other tools read 0 "
                "differently"
            )
    return {}


def pyramid(values: ConfigValues, layer: int) -> ConfigValues:
    """dots3_note's vision tower: pyramid_num_routed lists the number of experts of each layer, which bounds top-k."""
    counts = values.get("pyramid_num_routed")
    counts = _PYRAMID if counts is None and values.get("mlp_layer_types") is None else counts
    top_k, scale = values["num_experts_per_tok"], values["router_scaling_factor"]
    changed: dict[str, Any] = {
        "num_experts_per_tok": _get(values, "capacity_factor", 2) if top_k is None else top_k,
        "router_scaling_factor": _get(values, "router_scale", 1.0) if scale is None else scale,
        "hidden_size": _get(values, "embed_dim", values["hidden_size"]),
    }
    if counts is None or "per_layer_config" in values:
        return changed
    if not isinstance(counts, list) or not 0 <= layer < len(counts) or type(counts[layer]) is not int:
        raise ValueError(
            f"pyramid_num_routed is {counts!r:.80} in the model's config; expected a list with an int for layer {layer}"
        )
    if counts[layer] > 0 and type(changed["num_experts_per_tok"]) is int:
        changed |= {
            "num_local_experts": counts[layer],
            "num_experts_per_tok": min(changed["num_experts_per_tok"], counts[layer]),
        }
    return changed


def values_of_ffn_config(values: ConfigValues, layer: int) -> ConfigValues:
    """DBRX: ffn_config has the experts' keys; d_model is outside of it."""
    inner = values.get("ffn_config")
    inner = {} if inner is None else inner
    if not isinstance(inner, Mapping):
        raise ValueError(f"ffn_config is {inner!r:.80} in the model's config; expected a JSON object")
    act = inner.get("ffn_act_fn")
    function = "silu" if act is None else act.get("name", "silu") if isinstance(act, Mapping) else act
    fields = ("ffn_hidden_size", "moe_num_experts", "moe_top_k", "moe_normalize_expert_weights")
    return {**{name: inner[name] for name in fields if name in inner}, "ffn_act_fn": function}


def groups_or_none(values: ConfigValues, layer: int) -> ConfigValues:
    """AXK2: n_group and topk_group are both given, or both null."""
    if (values["n_group"] is None) != (values["topk_group"] is None):
        given = f"n_group is {values['n_group']!r:.80} and topk_group {values['topk_group']!r:.80}"
        raise ValueError(f"{given} in the model's config; expected both, or null for both")
    return {}


def one_expert(values: ConfigValues, layer: int) -> ConfigValues:
    """Zaya: top-1."""
    if values["num_experts_per_tok"] != 1:
        raise ValueError(
            f"num_experts_per_tok is {values['num_experts_per_tok']!r:.80} in the model's config; expected 1"
        )
    return {}


def weight_on_output(values: ConfigValues, layer: int) -> ConfigValues:
    """Laguna: transformers does not implement a routing weight on the experts' input."""
    on_input = values.get("moe_apply_router_weight_on_input", False)
    if on_input is not False:
        raise ValueError(f"moe_apply_router_weight_on_input is {on_input!r:.80} in the model's config; expected false")
    return {}
