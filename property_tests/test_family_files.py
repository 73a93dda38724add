"""Reading a config.json needs no transformers: defaults of classes, parts of a model, lists of layers."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from moe_fn.config import ActivationConfig
from moe_fn.families import FAMILIES, config_of_layer, older
from moe_fn.families.build import _WITH_RENORMALIZE
from moe_fn.families.defaults import CONFIG_CLASSES
from moe_fn.families.words import Word

Words = dict[str, Any]
SIZES: Words = {
    **dict.fromkeys(("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 1),
}


def test_a_deep_config_is_an_error_in_words() -> None:
    words: Words = {"model_type": "mixtral"}
    for _ in range(900):
        words = {"inner": words}
    with pytest.raises(ValueError, match="model_type is missing; expected one of"):
        config_of_layer(words, 0)


def test_what_a_file_leaves_out_is_its_class_s_default() -> None:
    """Not another class's of the same family."""
    gpt_oss: Words = {
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
        said = {"model_type": model_type, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 1}
        router = config_of_layer(said, 0).router
        assert (router.routed_scaling_factor, router.renormalize) == (scale, normalised), model_type


def test_every_family_reads_a_file_that_says_nothing_or_names_the_word_that_it_wants() -> None:
    for family in FAMILIES:
        for name in family.names:
            try:
                config_of_layer({"model_type": name}, 0)
            except ValueError as error:
                assert family.refused or (
                    "the model's config" in str(error) and "another kind than" not in str(error)
                ), (name, error)


def test_every_value_that_a_word_of_a_family_may_have_is_read() -> None:
    """Whichever values the tables name, with one of the names that a file has for the word."""
    read = 0
    for family in (family for family in FAMILIES if not family.refused):
        for word in words_in((family.router, family.activation, family.layer)):
            for said in (name for name in word.names if "." not in name):
                for value in word.values or ():
                    words = {"model_type": family.names[0], **SIZES, said: value}
                    try:
                        config_of_layer(words, 1)
                    except ValueError as error:
                        assert "another kind than" not in str(error), (words, error)
                    else:
                        read += 1
    assert read > 100


def words_in(value: Any) -> Iterator[Word]:
    """The words in a row of a table, those in other words, in limits and in products too."""
    if isinstance(value, Word):
        yield value
    parts = (
        [getattr(value, field.name) for field in dataclasses.fields(value)]
        if dataclasses.is_dataclass(value)
        else value
    )
    for inner in parts.values() if isinstance(parts, Mapping) else parts if isinstance(parts, list | tuple) else ():
        yield from words_in(inner)


def test_a_family_renormalises_unless_its_row_says_otherwise() -> None:
    """With what belongs to it: an epsilon, a minimum or an order, a constant of the row or a number of the file."""
    read = 0
    for family in (family for family in FAMILIES if not family.refused and "renormalize" not in family.router):
        own = {name: family.router[name] for name in _WITH_RENORMALIZE if name in family.router}
        words = {
            name: 0.25 for value in own.values() for word in words_in(value) for name in word.names if "." not in name
        }
        router = config_of_layer(
            {"model_type": family.names[0], **SIZES, "moe_intermediate_size": 4, **words}, 1
        ).router
        assert router.renormalize, family.names
        for name, value in own.items():
            assert getattr(router, name) == (0.25 if isinstance(value, Word) else value) != 0, (family.names, name)
            read += 1
    assert read


def test_an_error_says_what_was_read_and_what_was_left_out() -> None:
    said = (
        r"MoEConfig.num_experts is 0; expected an int >= 1; read from the model's config: num_experts \(0\); "
        r"left out, .*: hidden_size "
    )
    with pytest.raises(ValueError, match=said):
        config_of_layer({"model_type": "mixtral", "num_experts": 0}, 0)
    for words in (
        {"model_type": "hy_v3", "num_shared_experts": 0},
        {"model_type": "nemotron_h", "moe_shared_expert_intermediate_size": 0},
    ):
        with pytest.raises(
            ValueError,
            match=r"num_shared_experts|moe_shared_expert_intermediate_size is 0 in the model's config; expected",
        ):
            config_of_layer(words, 0)


def test_a_prefix_chooses_among_parts() -> None:
    """By its whole names; where all parts have a name, one of them has to be in it."""
    of_text = {"hidden_size": 8, "shared_expert_intermediate_size": 4}
    words = {
        "model_type": "qwen3_omni_moe",
        "thinker_config": {"text_config": of_text},
        "talker_config": {"text_config": of_text},
    }
    for prefix, experts, shared in (
        ("thinker.model.layers.0.mlp", 768, None),
        ("talker.model.layers.0.mlp", 384, 4),
        (None, 768, None),
    ):
        config = config_of_layer(words, 0, prefix)
        assert (config.intermediate_size, config.shared and config.shared.intermediate_size) == (experts, shared)
    for prefix in ("model.layers.0.mlp", "talkers.layers.0.mlp"):
        with pytest.raises(
            ValueError, match=r"2 parts with experts, and '.*' does not say which; expected 'thinker' or 'talker' in it"
        ):
            config_of_layer(words, 0, prefix)
    with pytest.raises(ValueError, match="text_config is 3 in the model's config; expected a JSON object"):
        config_of_layer({"model_type": "llama4", "text_config": 3}, 0)
    unlisted = {
        "model_type": "unheard_of",
        "speech_config": {"model_type": "mixtral"},
        "llm_config": {"model_type": "qwen3_moe"},
    }
    assert config_of_layer(unlisted, 0).num_experts == 128
    assert config_of_layer(unlisted, 0, "model.speech.layers.0.mlp").num_experts == 8


def test_lists_hold_an_entry_for_the_layer() -> None:
    words: Words = {"model_type": "hunyuan_v1_moe", "num_experts": 8, "moe_topk": [1, 2]}
    assert [config_of_layer(words, layer).top_k for layer in (0, 1)] == [1, 2]
    for layer in (2, -1):
        with pytest.raises(ValueError, match=f"moe_topk has 2 entries; expected one for layer {layer}"):
            config_of_layer(words, layer)
    own: Words = {"model_type": "mixtral", "num_experts": 6, "per_layer_config": {"01": {"num_experts": 4}}}
    assert [config_of_layer(own, layer).num_experts for layer in (0, 1, 10)] == [6, 4, 6]
    step: Words = {"model_type": "step3p5"}
    assert config_of_layer({**step, "swiglu_limits": [], "swiglu_limits_shared": []}, 1) == config_of_layer(step, 1)
    v4: Words = {"model_type": "deepseek_v4", "num_hash_layers": 1}
    assert [config_of_layer(v4, layer).router.selection for layer in (0, 1, 42, 43)] == [
        "hash",
        "top_k",
        "top_k",
        "top_k",
    ]
    with pytest.raises(ValueError, match="mlp_layer_types has 1 entries; expected one for layer 1"):
        config_of_layer({**v4, "mlp_layer_types": ["hash_moe"]}, 1)
    for said in (3, [{}], {"first": {}}, {"1": 3}, {"-1": {}}):
        with pytest.raises(
            ValueError, match=r"per_layer_config is .* in the model's config; expected the words of layers"
        ):
            config_of_layer({"model_type": "mixtral", "per_layer_config": said}, 1)


def test_words_that_belong_together_are_said_together() -> None:
    for words in ({"n_group": 8}, {"topk_group": 4}):
        with pytest.raises(
            ValueError, match=r"n_group is .* and topk_group .* in the model's config; expected both, or null for both"
        ):
            config_of_layer({"model_type": "axk2", **words}, 0)
    assert config_of_layer({"model_type": "axk2", "n_group": 8, "topk_group": 4}, 0).router.groups is not None
    with pytest.raises(ValueError, match="zero_expert_type is 'copy' in the model's config; expected 'identity'"):
        config_of_layer({"model_type": "longcat_flash", "zero_expert_type": "copy"}, 0)


def test_a_choice_within_one_group_has_two_names() -> None:
    """Limiting to groups changes nothing where there is one; where there are more, or none, the names differ."""
    for model_type in ("deepseek_v2", "mistral4"):
        groups: Words = {"model_type": model_type, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4}
        one, limited = ({**groups, "topk_method": method} for method in ("greedy", "group_limited_greedy"))
        assert config_of_layer(one, 0) == config_of_layer(limited, 0)
    for words in ({"model_type": "mixtral"}, {"model_type": "mistral4", "n_group": 8, "topk_group": 4}):
        wrong = "greedy" if "n_group" in words else "group_limited_greedy"
        with pytest.raises(ValueError, match=f"topk_method is '{wrong}' in the model's config; expected '"):
            config_of_layer({**words, "topk_method": wrong}, 0)


def test_infinity_as_transformers_writes_it_is_no_limit() -> None:
    config = config_of_layer({"model_type": "gpt_oss", "swiglu_limit": {"__float__": "Infinity"}}, 0)
    assert config.activation.limit is None  # type: ignore[union-attr]
    for unheard_of in ("infinity", None, 3, [], {}):
        with pytest.raises(
            ValueError, match=r"swiglu_limit is .*expected a number|another kind than this family's models have"
        ):
            config_of_layer({"model_type": "gpt_oss", "swiglu_limit": {"__float__": unheard_of}}, 0)


def test_words_of_older_files_are_those_of_the_class() -> None:
    """Those that a class takes beside its fields."""
    renamed = [name for name, known in CONFIG_CLASSES.items() if known.older is older.number_of_experts]
    assert renamed
    for model_type in renamed:
        assert config_of_layer({"model_type": model_type, "num_experts": 512}, 1).num_experts == 512, model_type
    for said in ("gelu", {"name": "gelu"}):
        activation = config_of_layer({"model_type": "dbrx", "ffn_config": {"ffn_act_fn": said}}, 0).activation
        assert isinstance(activation, ActivationConfig) and activation.function == "gelu"
    pyramid: Words = {"model_type": "dots3_note_vision_encoder", "pyramid_num_routed": [3, 5]}
    assert [config_of_layer(pyramid, layer).num_experts for layer in (0, 1)] == [3, 5]
    # which win: nothing else is of layer 0
    own = {**pyramid, "num_local_experts": 7, "per_layer_config": {"1": {"num_local_experts": 6}}}
    assert [config_of_layer(own, layer).num_experts for layer in (0, 1)] == [7, 6]
