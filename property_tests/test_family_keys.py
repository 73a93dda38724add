"""Keys of a config.json compared with transformers' config classes: missing, null, under other and older names, for one
layer.
"""

import ast
import copy
import functools
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_fn import MoEConfig, moe_forward
from moe_fn.families import config_of_layer
from moe_fn.families.find import CONFIG_CLASSES
from moe_fn.families.keys import MISSING
from moe_fn.integrations.transformers import from_block
from shared_tests.zoo import TOKEN_CHOICE, BlockRow, make_config, make_input, randomise, run_block
from shared_tests.zoo.build import module_of

ConfigValues = dict[str, Any]
# Rows with a config that config_of_layer reads: two banks are refused
ROWS = [row for row in TOKEN_CHOICE if row.family != "ernie4_5_vl_moe"]
FIRST = list({(row.config, row.block, row.args): row for row in reversed(ROWS)}.values())
# Keys that the class checks against parts of the model other than its Mixture of Experts
OF_THE_REST = {("granitemoehybrid", "hidden_size"), ("dots3_note", "hidden_size")}
EACH = pytest.mark.parametrize("row", FIRST, ids=lambda row: row.name)


def layer_of(row: BlockRow) -> int:
    return row.args[-1] if row.args else 1


@functools.cache
def _values(row: BlockRow) -> str:
    return str(make_config(row).to_json_string(use_diff=False))


def values_of(row: BlockRow) -> ConfigValues:
    return dict(
        json.loads(_values(row), object_hook=lambda entry: float(entry["__float__"]) if "__float__" in entry else entry)
    )


class Recorded(Mapping[str, Any]):
    """Values that record which keys were read."""

    def __init__(self, values: ConfigValues) -> None:
        self.values, self.read = values, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self.values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)


def keys_read(row: BlockRow) -> set[str]:
    """Returns the keys that config_of_layer reads for a row, whether the file has them or not."""
    recorded = Recorded(values_of(row))
    config_of_layer(recorded, layer_of(row))
    return recorded.read - {"model_type"}


def class_of(row: BlockRow) -> Any:
    return getattr(module_of(row, "configuration"), row.config)


def block_of(row: BlockRow, values: ConfigValues, device: str = "meta") -> torch.nn.Module:
    """Returns transformers' block for these values, as its model constructs it."""
    config = class_of(row).from_dict(copy.deepcopy(values))
    config._experts_implementation = "eager"
    if config.is_heterogeneous:
        config = config.per_layer_config[layer_of(row)]
    with torch.device(device):
        block: torch.nn.Module = getattr(module_of(row, "modeling"), row.block)(config, *row.args)
    return block


def theirs(row: BlockRow, values: ConfigValues) -> MoEConfig | None:
    """Returns the config of the block that transformers constructs; None where it raises."""
    try:
        return from_block(block_of(row, values))[0]
    except Exception:  # strict classes, blocks and from_block raise errors of many types
        return None


def ours(row: BlockRow, values: ConfigValues) -> MoEConfig | str:
    try:
        return config_of_layer(values, layer_of(row))
    except ValueError as error:
        return str(error)


def names_of(values: ConfigValues, name: str) -> set[str]:
    """Returns all names of a key."""
    renamed = CONFIG_CLASSES[values["model_type"]].renamed
    known = renamed.get(name, name)
    return {name, known, *(other for other, own in renamed.items() if own == known)}


def problem(row: BlockRow, values: ConfigValues, name: str) -> str | None:
    """Returns a failure message if the config is not transformers' and there is no error that names the key."""
    mine = ours(row, values)
    if isinstance(mine, str):
        # errors name a key as the class does, whichever of its names the file has
        return (
            None
            if any(known in mine for known in names_of(values, name)) or theirs(row, values) is None
            else f"{name}: {mine}"
        )
    wanted = theirs(row, values)
    if wanted is None and (row.family, name) in OF_THE_REST:
        return None
    return None if mine == wanted else f"{name} = {values.get(name, 'missing')}: {difference(mine, wanted)}"


def difference(mine: MoEConfig | str, wanted: MoEConfig | None) -> str:
    if isinstance(mine, str) or wanted is None:
        return f"{mine}, but transformers has {wanted}"
    other = wanted.to_dict()
    return str({key: (value, other[key]) for key, value in mine.to_dict().items() if value != other[key]})


@EACH
def test_a_missing_key_is_the_class_s_default(row: BlockRow) -> None:
    values = values_of(row)
    names = keys_read(row) & set(values)
    assert names
    assert theirs(row, values) == ours(row, values)
    found = [problem(row, {key: value for key, value in values.items() if key != name}, name) for name in sorted(names)]
    assert not any(found), "\n".join(filter(None, found))


@EACH
def test_an_empty_config_is_the_class_s_defaults(row: BlockRow) -> None:
    """All keys are missing at once, those that no variant of a row has included."""
    values = {"model_type": values_of(row)["model_type"]}
    mine = ours(row, values)
    assert mine == theirs(row, values) or isinstance(mine, str)


def test_every_default_is_its_class_s() -> None:
    """Defaults in the order of the fields, with the same other names, and null only where the class accepts it."""
    for model_type, known in CONFIG_CLASSES.items():
        same_class = {"kimi_k2": "deepseek_v3", "ernie4_5_vl_moe_bank": "ernie4_5_vl_moe_text"}
        config_class = CONFIG_MAPPING[same_class.get(model_type, model_type)]
        fields = {name: field for name, field in config_class.__dataclass_fields__.items() if name in known.defaults}
        if model_type != "dbrx":  # its keys are in a nested config without other names
            assert list(fields) == [name for name in known.defaults if name in fields], model_type
            unknown = set(known.defaults) - set(fields)
            assert all(known.defaults[name] is MISSING for name in unknown), (model_type, unknown)
            for name, field in fields.items():
                assert known.defaults[name] in (field.default, MISSING), (model_type, name)
                if known.defaults[name] is not MISSING:
                    assert (name in known.nullable) == ("None" in str(field.type)), (model_type, name)
            read = {config_class.attribute_map.get(name, name) for name in known.defaults}
            assert dict(known.renamed) == {a: b for a, b in config_class.attribute_map.items() if b in read}, model_type


@EACH
def test_null_is_read_as_the_class_reads_it(row: BlockRow) -> None:
    """Where null gives a config, the block of transformers computes the same numbers."""
    values = values_of(row)
    renamed = CONFIG_CLASSES[values["model_type"]].renamed
    for name in sorted(keys_read(row) | set(renamed)):
        nulled = {**values, name: None}
        mine = ours(row, nulled)
        if isinstance(mine, str):
            assert any(known in mine for known in names_of(values, name)), f"{name}: {mine}"
            continue
        block = block_of(row, nulled, "cpu")
        randomise(block.float(), 0)
        of_block, weights = from_block(block.eval())
        assert mine == of_block, name
        if row.takes in ("hidden", "input_ids") and row.family != "zaya":
            x = make_input(row, 1)
            as_chosen = replace(row, takes="input_ids" if mine.router.selection == "hash" else "hidden")
            with torch.no_grad():
                wanted = run_block(as_chosen, block, x)
                y = moe_forward(mine, weights, x, token_ids=wanted.token_ids)
            assert (y - wanted.y).norm() <= 1e-5 * wanted.y.norm(), name


@EACH
def test_other_names_win_as_in_the_class(row: BlockRow) -> None:
    """Names of attribute_map: alone, with the class's own name before and after it, and null."""
    values = values_of(row)
    known = CONFIG_CLASSES[values["model_type"]]
    found = []
    for other, name in known.renamed.items():
        value = next((values[own] for own in (name, other) if own in values), None)
        changed = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value
        without = {key: entry for key, entry in values.items() if key not in (name, other)}
        orders = ({other: changed}, {name: value, other: changed}, {other: changed, name: value}, {other: None})
        found += [problem(row, {**without, **order}, other) for order in orders]
    assert not any(found), "\n".join(filter(None, found))


@EACH
def test_an_activation_is_read_by_its_name(row: BlockRow) -> None:
    """Unknown activations are errors, in a live block too: none is read as another."""
    values = values_of(row)
    for name in sorted(
        keys_read(row) & {"hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act", "dense_act_fn"}
    ):
        for act in (
            "swish",
            "gelu",
            "gelu_new",
            "gelu_python_tanh",
            "quick_gelu",
            "relu2",
            "gelu_10",
            "mish",
            "tanh",
            "unknown",
        ):
            mine = ours(row, {**values, name: act})
            wanted = theirs(row, {**values, name: act})
            if wanted is not None or row.family != "qwen4_exp":  # its attention does not accept every activation
                assert wanted == (None if isinstance(mine, str) else mine), (name, act, mine)


def older_keys(config_class: Any) -> set[str]:
    """Returns keys that a class accepts in addition to its fields: those that __post_init__ takes from its keywords."""
    found = set()
    for base in config_class.__mro__:
        if "__post_init__" in base.__dict__ and base.__module__.startswith("transformers.models"):
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base.__post_init__)))):
                if (
                    isinstance(node, ast.Call)
                    and ast.unparse(node.func) in ("kwargs.get", "kwargs.pop")
                    and isinstance(node.args[0], ast.Constant)
                ):
                    found.add(str(node.args[0].value))
    return found


@pytest.mark.thorough
@EACH
def test_older_keys_are_read_as_the_class_reads_them(row: BlockRow) -> None:
    values = values_of(row)
    found = []
    for name in sorted(older_keys(class_of(row)) - set(values)):
        for value in (0, 1, 2, 4, 64, 1.5, False, None, [4, 4], [-1, 2]):
            for base in (
                values,
                {key: entry for key, entry in values.items() if key not in ("mlp_layer_types", "per_layer_config")},
            ):
                changed = {**base, name: value}
                wanted, mine = theirs(row, changed), ours(row, changed)
                if wanted is not None and mine != wanted and not (isinstance(mine, str) and name in mine):
                    found.append(f"{name} = {value}: {difference(mine, wanted)}")
    assert not found, "\n".join(found)
