"""Words of older or published files as the words of transformers' classes, where a class does more than to rename.

A function each: from all words and the layer to the words that change.
"""

from collections.abc import Mapping
from typing import Any

from moe_fn.families.classes import Words

_HASH_LAYERS = 3  # of DeepSeek-V4, where a file says neither their number nor the kinds of its layers
_PYRAMID = [-1] * 25 + list(range(4, 65, 4)) + [64]  # experts in the layers of dots3_note's images; -1 is a dense layer


def _said(words: Words, name: str, otherwise: Any) -> Any:
    """A word that may be left out and may not be null."""
    value = words.get(name, otherwise)
    if value is None and name in words:
        raise ValueError(f"{name} is None in the model's config; expected a number")
    return value


def kinds_of_layers(words: Words, layer: int) -> Words:
    """DeepSeek-V4: the first num_hash_layers layers choose by the token, unless mlp_layer_types says which."""
    if words["mlp_layer_types"] is not None:
        return {}
    count = words.get("num_hash_layers")
    count = _HASH_LAYERS if count is None else count
    if type(count) is not int:
        raise ValueError(f"num_hash_layers is {count!r:.80} in the model's config; expected a whole number")
    return {"mlp_layer_types": "hash_moe" if layer < count else "moe"}


def number_of_experts(words: Words, layer: int) -> Words:
    """DeepSeek-V3.2 and its kin: num_experts is n_routed_experts."""
    count = words.get("num_experts")
    return {} if count is None else {"n_routed_experts": count}


def width_beside_dense(words: Words, layer: int) -> Words:
    """Inkling: beside a dense_intermediate_size, intermediate_size is the experts'."""
    return {} if words.get("dense_intermediate_size") is None else {"moe_intermediate_size": words["intermediate_size"]}


def scale_or_one(words: Words, layer: int) -> Words:
    """MiMo-V2-Flash: its published file has null for no scale."""
    return {"routed_scaling_factor": 1.0} if words["routed_scaling_factor"] is None else {}


def width_of_shared(words: Words, layer: int) -> Words:
    """dots3_note: moe_shared_expert_intermediate_size is shared_experts_intermediate_size."""
    name = "shared_experts_intermediate_size"
    return {name: _said(words, "moe_shared_expert_intermediate_size", words[name])}


def limits_or_none(words: Words, layer: int) -> Words:
    """Step: an empty list limits no layer."""
    return {name: None for name in ("swiglu_limits", "swiglu_limits_shared") if words[name] == []}


def no_shared_of_width_0(words: Words, layer: int) -> Words:
    """Hy3 and Nemotron-H: of no width, shared experts are as wide as a dense layer in transformers, and none in other
    tools.
    """
    for name in ("num_shared_experts", "moe_shared_expert_intermediate_size"):
        if words.get(name) == 0:
            raise ValueError(
                f"{name} is 0 in the model's config; expected at least 1, for tools do not agree on what 0 is"
            )
    return {}


def pyramid(words: Words, layer: int) -> Words:
    """dots3_note's images: pyramid_num_routed holds the number of experts of each layer, of which at most so many can
    be chosen.
    """
    counts = words.get("pyramid_num_routed")
    counts = _PYRAMID if counts is None and words.get("mlp_layer_types") is None else counts
    top_k, scale = words["num_experts_per_tok"], words["router_scaling_factor"]
    made: dict[str, Any] = {
        "num_experts_per_tok": _said(words, "capacity_factor", 2) if top_k is None else top_k,
        "router_scaling_factor": _said(words, "router_scale", 1.0) if scale is None else scale,
        "hidden_size": _said(words, "embed_dim", words["hidden_size"]),
    }
    if counts is None or "per_layer_config" in words:
        return made
    if not isinstance(counts, list) or not 0 <= layer < len(counts) or type(counts[layer]) is not int:
        raise ValueError(
            f"pyramid_num_routed is {counts!r:.80} in the model's config; expected the number of experts of layer "
            f"{layer}"
        )
    if counts[layer] > 0 and type(made["num_experts_per_tok"]) is int:
        made |= {
            "num_local_experts": counts[layer],
            "num_experts_per_tok": min(made["num_experts_per_tok"], counts[layer]),
        }
    return made


def words_of_ffn(words: Words, layer: int) -> Words:
    """DBRX: ffn_config holds the words of its experts; the width of the model is outside."""
    inner = words.get("ffn_config")
    inner = {} if inner is None else inner
    if not isinstance(inner, Mapping):
        raise ValueError(f"ffn_config is {inner!r:.80} in the model's config; expected a JSON object")
    act = inner.get("ffn_act_fn")
    function = "silu" if act is None else act.get("name", "silu") if isinstance(act, Mapping) else act
    fields = ("ffn_hidden_size", "moe_num_experts", "moe_top_k", "moe_normalize_expert_weights")
    return {**{name: inner[name] for name in fields if name in inner}, "ffn_act_fn": function}


def groups_or_none(words: Words, layer: int) -> Words:
    """AXK2: groups are said whole, or not at all."""
    if (words["n_group"] is None) != (words["topk_group"] is None):
        said = f"n_group is {words['n_group']!r:.80} and topk_group {words['topk_group']!r:.80}"
        raise ValueError(f"{said} in the model's config; expected both, or null for both")
    return {}


def one_expert(words: Words, layer: int) -> Words:
    """Zaya: a token goes to one expert."""
    if words["num_experts_per_tok"] != 1:
        raise ValueError(
            f"num_experts_per_tok is {words['num_experts_per_tok']!r:.80} in the model's config; expected 1"
        )
    return {}


def weight_on_output(words: Words, layer: int) -> Words:
    """Laguna: transformers does not have the weight on the input of an expert."""
    on_input = words.get("moe_apply_router_weight_on_input", False)
    if on_input is not False:
        raise ValueError(f"moe_apply_router_weight_on_input is {on_input!r:.80} in the model's config; expected false")
    return {}
