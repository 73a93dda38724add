"""config_of_layer without transformers: defaults of config classes, parts of a model, lists of layers."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from moe_fn.config import ActivationConfig
from moe_fn.families import FAMILIES, config_class, config_of_layer
from moe_fn.families.build import _WITH_RENORMALIZE
from moe_fn.families.find import CONFIG_CLASSES
from moe_fn.families.keys import Key

ConfigValues = dict[str, Any]
SIZES: ConfigValues = {
    **dict.fromkeys(("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 1),
}


def test_a_deep_config_is_a_value_error() -> None:
    values: ConfigValues = {"model_type": "mixtral"}
    for _ in range(900):
        values = {"inner": values}
    with pytest.raises(ValueError, match="model_type is missing; expected one of"):
        config_of_layer(values, 0)


def test_a_missing_key_has_its_class_s_default() -> None:
    """Defaults differ between the classes of one family."""
    gpt_oss: ConfigValues = {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
    }
    activation = config_of_layer(gpt_oss, 0).activation
    assert isinstance(activation, ActivationConfig) and activation.limit == 7.0
    for model_type, scale, normalised in (
        ("deepseek_v3", 2.5, True),
        ("glm4_moe", 1.0, True),
        ("dots1", 1.0, False),
        ("kimi_k2", 2.5, True),
    ):
        values = {"model_type": model_type, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 1}
        router = config_of_layer(values, 0).router
        assert (router.routed_scaling_factor, router.renormalize) == (scale, normalised), model_type


def test_every_family_reads_an_empty_config_or_names_the_missing_key() -> None:
    for family in FAMILIES:
        for name in family.names:
            try:
                config_of_layer({"model_type": name}, 0)
            except ValueError as error:
                assert family.refused or (
                    "the model's config" in str(error) and "another type than" not in str(error)
                ), (name, error)


def test_every_value_in_the_table_of_a_key_is_read() -> None:
    """Each value that a row translates, under each name that the key has in a file."""
    read = 0
    for family in (family for family in FAMILIES if not family.refused):
        for key in keys_in((family.router, family.activation, family.layer)):
            for name in (name for name in key.names if "." not in name):
                for value in key.values or ():
                    values = {"model_type": family.names[0], **SIZES, name: value}
                    try:
                        config_of_layer(values, 1)
                    except ValueError as error:
                        assert "another type than" not in str(error), (values, error)
                    else:
                        read += 1
    assert read > 100


def keys_in(value: Any) -> Iterator[Key]:
    """Yields the keys in a row of a table, nested ones too."""
    if isinstance(value, Key):
        yield value
    parts = (
        [getattr(value, field.name) for field in dataclasses.fields(value)]
        if dataclasses.is_dataclass(value)
        else value
    )
    for inner in parts.values() if isinstance(parts, Mapping) else parts if isinstance(parts, list | tuple) else ():
        yield from keys_in(inner)


def test_a_family_renormalizes_by_default() -> None:
    """Its epsilon, minimum or order is a constant of the row or a number of the file."""
    read = 0
    for family in (family for family in FAMILIES if not family.refused and "renormalize" not in family.router):
        own = {name: family.router[name] for name in _WITH_RENORMALIZE if name in family.router}
        values = {
            name: 0.25 for value in own.values() for key in keys_in(value) for name in key.names if "." not in name
        }
        router = config_of_layer(
            {"model_type": family.names[0], **SIZES, "moe_intermediate_size": 4, **values}, 1
        ).router
        assert router.renormalize, family.names
        for name, value in own.items():
            assert getattr(router, name) == (0.25 if isinstance(value, Key) else value) != 0, (family.names, name)
            read += 1
    assert read


def test_an_error_lists_the_keys_that_were_read_and_the_defaults() -> None:
    message = (
        r"MoEConfig.num_experts is 0; expected an int >= 1; the model's config has: num_experts \(0\); "
        r"defaults of its class: hidden_size "
    )
    with pytest.raises(ValueError, match=message):
        config_of_layer({"model_type": "mixtral", "num_experts": 0}, 0)
    for values in (
        {"model_type": "hy_v3", "num_shared_experts": 0},
        {"model_type": "nemotron_h", "moe_shared_expert_intermediate_size": 0},
    ):
        with pytest.raises(
            ValueError,
            match=r"num_shared_experts|moe_shared_expert_intermediate_size is 0 in the model's config; expected",
        ):
            config_of_layer(values, 0)


def test_a_prefix_chooses_among_parts() -> None:
    """Names of modules are compared whole. Where all parts have names, the prefix must have one of them."""
    of_text = {"hidden_size": 8, "shared_expert_intermediate_size": 4}
    values = {
        "model_type": "qwen3_omni_moe",
        "thinker_config": {"text_config": of_text},
        "talker_config": {"text_config": of_text},
    }
    for prefix, experts, shared in (
        ("thinker.model.layers.0.mlp", 768, None),
        ("talker.model.layers.0.mlp", 384, 4),
        (None, 768, None),
    ):
        config = config_of_layer(values, 0, prefix)
        assert (config.intermediate_size, config.shared and config.shared.intermediate_size) == (experts, shared)
    for prefix in ("model.layers.0.mlp", "talkers.layers.0.mlp"):
        with pytest.raises(
            ValueError, match=r"2 parts with experts, and '.*' is in none of them; expected 'thinker' or 'talker' in it"
        ):
            config_of_layer(values, 0, prefix)
    with pytest.raises(ValueError, match="text_config is 3 in the model's config; expected a JSON object"):
        config_of_layer({"model_type": "llama4", "text_config": 3}, 0)
    unlisted = {
        "model_type": "unknown",
        "speech_config": {"model_type": "mixtral"},
        "llm_config": {"model_type": "qwen3_moe"},
    }
    assert config_of_layer(unlisted, 0).num_experts == 128
    assert config_of_layer(unlisted, 0, "model.speech.layers.0.mlp").num_experts == 8


def test_lists_hold_an_entry_for_the_layer() -> None:
    values: ConfigValues = {"model_type": "hunyuan_v1_moe", "num_experts": 8, "moe_topk": [1, 2]}
    assert [config_of_layer(values, layer).top_k for layer in (0, 1)] == [1, 2]
    for layer in (2, -1):
        with pytest.raises(ValueError, match=f"moe_topk has 2 entries; expected one for layer {layer}"):
            config_of_layer(values, layer)
    own: ConfigValues = {"model_type": "mixtral", "num_experts": 6, "per_layer_config": {"01": {"num_experts": 4}}}
    assert [config_of_layer(own, layer).num_experts for layer in (0, 1, 10)] == [6, 4, 6]
    step: ConfigValues = {"model_type": "step3p5"}
    assert config_of_layer({**step, "swiglu_limits": [], "swiglu_limits_shared": []}, 1) == config_of_layer(step, 1)
    v4: ConfigValues = {"model_type": "deepseek_v4", "num_hash_layers": 1}
    assert [config_of_layer(v4, layer).router.selection for layer in (0, 1, 42, 43)] == [
        "hash",
        "top_k",
        "top_k",
        "top_k",
    ]
    with pytest.raises(ValueError, match="mlp_layer_types has 1 entries; expected one for layer 1"):
        config_of_layer({**v4, "mlp_layer_types": ["hash_moe"]}, 1)
    for value in (3, [{}], {"first": {}}, {"1": 3}, {"-1": {}}):
        with pytest.raises(
            ValueError,
            match=r"per_layer_config is .* in the model's config; expected an object of keys for each layer",
        ):
            config_of_layer({"model_type": "mixtral", "per_layer_config": value}, 1)


def test_keys_that_belong_together_are_given_together() -> None:
    for values in ({"n_group": 8}, {"topk_group": 4}):
        with pytest.raises(
            ValueError, match=r"n_group is .* and topk_group .* in the model's config; expected both, or null for both"
        ):
            config_of_layer({"model_type": "axk2", **values}, 0)
    assert config_of_layer({"model_type": "axk2", "n_group": 8, "topk_group": 4}, 0).router.groups is not None
    with pytest.raises(ValueError, match="zero_expert_type is 'copy' in the model's config; expected 'identity'"):
        config_of_layer({"model_type": "longcat_flash", "zero_expert_type": "copy"}, 0)


def test_a_choice_within_one_group_has_two_names() -> None:
    """With one group both names mean the same; with more, or none, they differ."""
    for model_type in ("deepseek_v2", "mistral4"):
        groups: ConfigValues = {"model_type": model_type, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4}
        one, limited = ({**groups, "topk_method": method} for method in ("greedy", "group_limited_greedy"))
        assert config_of_layer(one, 0) == config_of_layer(limited, 0)
    for values in ({"model_type": "mixtral"}, {"model_type": "mistral4", "n_group": 8, "topk_group": 4}):
        wrong = "greedy" if "n_group" in values else "group_limited_greedy"
        with pytest.raises(ValueError, match=f"topk_method is '{wrong}' in the model's config; expected '"):
            config_of_layer({**values, "topk_method": wrong}, 0)


def test_infinity_as_transformers_writes_it_is_no_limit() -> None:
    config = config_of_layer({"model_type": "gpt_oss", "swiglu_limit": {"__float__": "Infinity"}}, 0)
    assert config.activation.limit is None  # type: ignore[union-attr]
    for unknown in ("infinity", None, 3, [], {}):
        with pytest.raises(
            ValueError, match=r"swiglu_limit is .*expected a number|another type than this family's configs have"
        ):
            config_of_layer({"model_type": "gpt_oss", "swiglu_limit": {"__float__": unknown}}, 0)


def test_keys_of_older_files_are_converted_to_those_of_the_class() -> None:
    """Keys that a class accepts in addition to its fields."""
    renamed = [name for name, known in CONFIG_CLASSES.items() if known.older is config_class.number_of_experts]
    assert renamed
    for model_type in renamed:
        assert config_of_layer({"model_type": model_type, "num_experts": 512}, 1).num_experts == 512, model_type
    for act in ("gelu", {"name": "gelu"}):
        activation = config_of_layer({"model_type": "dbrx", "ffn_config": {"ffn_act_fn": act}}, 0).activation
        assert isinstance(activation, ActivationConfig) and activation.function == "gelu"
    pyramid: ConfigValues = {"model_type": "dots3_note_vision_encoder", "pyramid_num_routed": [3, 5]}
    assert [config_of_layer(pyramid, layer).num_experts for layer in (0, 1)] == [3, 5]
    # per_layer_config overrides them, for layer 1 only
    own = {**pyramid, "num_local_experts": 7, "per_layer_config": {"1": {"num_local_experts": 6}}}
    assert [config_of_layer(own, layer).num_experts for layer in (0, 1)] == [7, 6]
