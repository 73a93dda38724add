"""Nested configs, values of single layers, values of wrong types, and keys that name a function, for every family."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from test_checkpoint_families import check, on_disk
from test_family_keys import EACH, FIRST, ConfigValues, keys_read, layer_of, names_of, ours, theirs, values_of
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_fn.checkpoint import load_moe_layer, moe_layers
from moe_fn.families import FAMILIES, config_of_layer
from moe_fn.families.find import CONFIG_CLASSES, PARTS
from moe_fn.families.row import Part
from shared_tests.zoo import TOKEN_CHOICE, BlockRow, make_block

OF_TYPE = {values_of(row)["model_type"]: row for row in FIRST}
SINGLE = [
    (outer, model_type, part)
    for outer, parts in PARTS.items()
    for model_type, part in parts
    if model_type in OF_TYPE and outer in CONFIG_MAPPING
]


def nested_in(config_class: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str, bool]]:
    """Returns paths of the configs that a class nests, their model_type, and whether a file may have another one."""
    found = []
    for name, spec in config_class.sub_configs_defaults.items():
        chosen = not issubclass(spec.config_class, PreTrainedConfig)
        found.append(((*path, name), spec.model_type, chosen))
        found += [] if chosen else nested_in(spec.config_class, (*path, name))
    return found


def test_every_family_has_a_class_or_parts() -> None:
    for family in FAMILIES:
        assert family.refused or all(name in CONFIG_CLASSES or name in PARTS for name in family.names), family.names


@pytest.mark.thorough  # imports all of transformers' config classes
def test_every_config_that_nests_a_mixture_of_experts_is_listed() -> None:
    for outer in CONFIG_MAPPING:
        nested = {
            (path, kind, chosen) for path, kind, chosen in nested_in(CONFIG_MAPPING[outer]) if kind in CONFIG_CLASSES
        }
        listed = {
            (part.path, model_type, part.chosen)
            for model_type, part in PARTS.get(outer, ())
            if model_type in CONFIG_CLASSES
        }
        assert nested == listed, outer


def put(path: tuple[str, ...], values: ConfigValues) -> ConfigValues:
    for name in reversed(path):
        values = {name: values}
    return values


@pytest.mark.parametrize(
    ("outer", "model_type", "part"), SINGLE, ids=lambda value: value if isinstance(value, str) else value.path[0]
)
def test_a_part_is_read_alone(outer: str, model_type: str, part: Part) -> None:
    """Other parts and outer keys have no effect; a missing key is the default of the part's own class."""
    row = OF_TYPE[model_type]
    values = {name: value for name, value in values_of(row).items() if name != "model_type"}
    prefix = f"{part.named[0]}.layers.1.mlp" if part.named else "model.layers.1.mlp"
    decoys: ConfigValues = dict.fromkeys(keys_read(row), 3) | {"model_type": outer, "text_config": {"num_experts": 5}}
    decoys |= {other.path[0]: {"hidden_size": 5} for _, other in PARTS[outer] if other.path[0] != part.path[0]}
    for missing in ("", "hidden_size", "num_experts_per_tok", "hidden_act", "norm_topk_prob"):
        inner = {name: value for name, value in values.items() if name != missing}
        wanted = ours(row, {**inner, "model_type": model_type})
        try:
            mine = config_of_layer({**decoys, **put(part.path, inner)}, layer_of(row), prefix)
        except ValueError as error:
            assert str(error) == wanted
            continue
        assert mine == wanted
        try:
            made: Any = CONFIG_MAPPING[outer].from_dict({"model_type": outer, **put(part.path, inner)})
        except StrictDataclassError:  # the sizes of the parts do not fit
            continue
        for name in part.path:
            made = getattr(made, name)
        assert ours(row, json.loads(made.to_json_string(use_diff=False))) == mine


# One class has its own keys for its text config; the defaults of the other fail its own check
OF_THEIR_OWN = ("nemo_speechlm", "gemma4_assistant")


@pytest.mark.parametrize("outer", [outer for outer in PARTS if outer in CONFIG_MAPPING and outer not in OF_THEIR_OWN])
def test_a_config_without_its_parts_has_their_defaults(outer: str) -> None:
    made: Any = CONFIG_MAPPING[outer]()
    for name in PARTS[outer][0][1].path:
        made = getattr(made, name)
    inner = json.loads(made.to_json_string(use_diff=False))
    for values in ({"model_type": outer}, {"model_type": outer, PARTS[outer][0][1].path[0]: None}):
        try:
            wanted = config_of_layer(inner, 0)
        except ValueError as error:
            with pytest.raises(ValueError, match=str(error)[:30]):
                config_of_layer(values, 0)
        else:
            assert config_of_layer(values, 0) == wanted


# Keys that a class checks, or copies elsewhere, before it splits values by layer
NOT_OF_A_LAYER = {"moe_apply_router_weight_on_input", "d_model", "ffn_config"}
# Keys that these rows' variants do not use: another key or another selection replaces them
OF_NO_USE = {("inkling", "intermediate_size"), ("dots3_note", "num_local_experts"), ("cohere2_moe", "norm_topk_prob")}
OF_NO_USE |= {("cohere2_moe", "shared_expert_combination_strategy")}
OF_NO_USE |= {
    (family, name) for family in ("deepseek_v2", "deepseek_ocr2", "unlimited_ocr") for name in ("n_group", "topk_group")
}
TWO_PARTS = {
    "qwen3_omni_moe": {
        "qwen3_omni_moe_text": "thinker.model.layers.{}.mlp",
        "qwen3_omni_moe_talker_text": "talker.model.layers.{}.mlp",
    },
    "dots3_note": {
        "dots3_note_text": "model.language_model.layers.{}.mlp",
        "dots3_note_vision_encoder": "model.vision_tower.blocks.{}.mlp",
    },
}


@pytest.mark.parametrize("outer", TWO_PARTS)
def test_a_checkpoint_of_two_parts_is_the_blocks_of_both(outer: str, tmp_path: Path) -> None:
    tensors, values, blocks = {}, {"model_type": outer}, {}
    for model_type, template in TWO_PARTS[outer].items():
        row = next(row for row in TOKEN_CHOICE if values_of(row)["model_type"] == model_type)
        prefix, block = template.format(layer_of(row)), make_block(row, 0)
        state = {f"{prefix}.{name}": t.contiguous().clone() for name, t in block.state_dict().items()}
        tensors.update({name: t.contiguous() for name, t in on_disk(row, state).items()})
        values |= put(next(part.path for name, part in PARTS[outer] if name == model_type), values_of(row))
        blocks[prefix] = (row, block)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert {layer.prefix: layer.problem for layer in moe_layers(tmp_path)} == dict.fromkeys(blocks)
    for prefix, (row, block) in blocks.items():
        check(row, block, *load_moe_layer(tmp_path, prefix))


@pytest.mark.thorough
@EACH
def test_per_layer_config_is_read_for_its_layer(row: BlockRow) -> None:
    """A layer's entry overrides the model's values; entries of other layers have no effect."""
    values, compared = values_of(row), 0
    layers = values.pop("per_layer_config", None) or {}
    for name in sorted(keys_read(row) & set(values) - NOT_OF_A_LAYER):
        value = values[name]
        changed = not value if isinstance(value, bool) else value * 2 if isinstance(value, int | float) else value
        for layer in (layer_of(row), 1 - layer_of(row)):
            own = next((dict(entry) for key, entry in layers.items() if int(key) == layer), {})
            others = {key: entry for key, entry in layers.items() if int(key) != layer}
            given = {**values, "per_layer_config": {**others, f"{layer:03}": {**own, name: changed}}}
            wanted = theirs(row, given)  # None: the class compares layers with each other
            compared += wanted is not None
            assert wanted is None or ours(row, given) == wanted, (name, layer)
    assert compared or row.family in ("dots3_note", "dbrx")


@EACH
def test_a_value_of_another_type_is_an_error(row: BlockRow) -> None:
    """An int is not a bool or a float, a bool is not a string; a float may be written as an int, a bool as 0 or 1."""
    values = values_of(row)
    for name in sorted((keys_read(row) & set(values)) - {"ffn_config"}):
        if (row.family, name) in OF_NO_USE:
            continue
        value = values[name]
        wrong = {
            bool: ("yes", 2, [], 0.5),
            int: (True, 2.0, "2", {}, 1e99),
            float: (True, "1.0", {}, 10**400),
            str: ("unknown", 1, {}, []),
        }
        for other in wrong.get(type(value), ()):
            mine = ours(row, {**values, name: other})
            assert isinstance(mine, str) and any(known in mine for known in names_of(values, name)), (name, other, mine)
        if isinstance(value, float) and value != int(value):
            assert ours(row, {**values, name: 2}) == ours(row, {**values, name: 2.0}), name
        if isinstance(value, bool) and name not in NOT_OF_A_LAYER:
            assert ours(row, {**values, name: int(value)}) == ours(row, values), name


@EACH
def test_0_is_read_as_the_class_reads_it(row: BlockRow) -> None:
    """Or it is an error that names the key, or the field that it sets."""
    values = values_of(row)
    for name in sorted((keys_read(row) & set(values)) - NOT_OF_A_LAYER):
        mine, wanted = ours(row, {**values, name: 0}), theirs(row, {**values, name: 0})
        assert mine == wanted or wanted is None or isinstance(mine, str), name
        assert not isinstance(mine, str) or any(known in mine for known in names_of(values, name)), (name, mine)


SCORES = (
    "scoring_func",
    "score_func",
    "score_function",
    "moe_router_activation_func",
    "moe_router_activation",
    "expert_selection_fn",
)


@EACH
def test_a_key_that_names_a_function_names_the_computed_one(row: BlockRow) -> None:
    values = values_of(row)
    config = config_of_layer(values, layer_of(row))
    for name in (*SCORES, "topk_method"):
        for value in ("unknown", "identity", ["sigmoid"], {}, 1, "sigmoid", "softmax", "sqrtsoftplus"):
            changed = {**values, name: value}
            mine = ours(row, changed)
            if isinstance(mine, str):
                assert name in mine
                continue
            assert name != "topk_method" and mine.router.scoring == value
            assert mine == (theirs(row, changed) if name in values else config)
