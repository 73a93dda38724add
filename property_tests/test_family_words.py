"""Words of a config.json against transformers' own config classes: left out, null, by other and older names, and one
layer's own.
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
from moe_fn.families.defaults import CONFIG_CLASSES
from moe_fn.families.words import MISSING
from moe_fn.integrations.transformers import from_block
from shared_tests.zoo import TOKEN_CHOICE, BlockRow, make_config, make_input, randomise, run_block
from shared_tests.zoo.build import module_of

Words = dict[str, Any]
# Rows whose block is what config_of_layer describes: two banks are refused
ROWS = [row for row in TOKEN_CHOICE if row.family != "ernie4_5_vl_moe"]
FIRST = list({(row.config, row.block, row.args): row for row in reversed(ROWS)}.values())
# Words that the class holds against parts of the model that are no Mixture of Experts
OF_THE_REST = {("granitemoehybrid", "hidden_size"), ("dots3_note", "hidden_size")}
EACH = pytest.mark.parametrize("row", FIRST, ids=lambda row: row.name)


def layer_of(row: BlockRow) -> int:
    return row.args[-1] if row.args else 1


@functools.cache
def _words(row: BlockRow) -> str:
    return str(make_config(row).to_json_string(use_diff=False))


def words_of(row: BlockRow) -> Words:
    return dict(
        json.loads(_words(row), object_hook=lambda entry: float(entry["__float__"]) if "__float__" in entry else entry)
    )


class Recorded(Mapping[str, Any]):
    """Words that remember which of them were read."""

    def __init__(self, words: Words) -> None:
        self.words, self.read = words, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self.words[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __len__(self) -> int:
        return len(self.words)


def words_read(row: BlockRow) -> set[str]:
    """The words that config_of_layer reads for a row, whether the file has them or not."""
    recorded = Recorded(words_of(row))
    config_of_layer(recorded, layer_of(row))
    return recorded.read - {"model_type"}


def class_of(row: BlockRow) -> Any:
    return getattr(module_of(row, "configuration"), row.config)


def block_of(row: BlockRow, words: Words, device: str = "meta") -> torch.nn.Module:
    """transformers' block of these words, as its model would make it."""
    config = class_of(row).from_dict(copy.deepcopy(words))
    config._experts_implementation = "eager"
    if config.is_heterogeneous:
        config = config.per_layer_config[layer_of(row)]
    with torch.device(device):
        block: torch.nn.Module = getattr(module_of(row, "modeling"), row.block)(config, *row.args)
    return block


def theirs(row: BlockRow, words: Words) -> MoEConfig | None:
    """What transformers makes of the words; None where it makes nothing."""
    try:
        return from_block(block_of(row, words))[0]
    except Exception:  # strict classes, blocks and from_block have errors of many kinds
        return None


def ours(row: BlockRow, words: Words) -> MoEConfig | str:
    try:
        return config_of_layer(words, layer_of(row))
    except ValueError as error:
        return str(error)


def names_of(words: Words, name: str) -> set[str]:
    """All names of a word."""
    renamed = CONFIG_CLASSES[words["model_type"]].renamed
    known = renamed.get(name, name)
    return {name, known, *(other for other, own in renamed.items() if own == known)}


def problem(row: BlockRow, words: Words, name: str) -> str | None:
    """What is wrong where a word was changed: neither is it transformers' config, nor an error that names the word."""
    mine = ours(row, words)
    if isinstance(mine, str):
        # an older or other name is read as the class's own, by which errors know it
        return (
            None
            if any(known in mine for known in names_of(words, name)) or theirs(row, words) is None
            else f"{name}: {mine}"
        )
    wanted = theirs(row, words)
    if wanted is None and (row.family, name) in OF_THE_REST:
        return None
    return None if mine == wanted else f"{name} = {words.get(name, 'left out')}: {difference(mine, wanted)}"


def difference(mine: MoEConfig | str, wanted: MoEConfig | None) -> str:
    if isinstance(mine, str) or wanted is None:
        return f"{mine}, but transformers has {wanted}"
    other = wanted.to_dict()
    return str({key: (value, other[key]) for key, value in mine.to_dict().items() if value != other[key]})


@EACH
def test_a_word_that_is_left_out_is_the_class_s_default(row: BlockRow) -> None:
    words = words_of(row)
    names = words_read(row) & set(words)
    assert names
    assert theirs(row, words) == ours(row, words)
    found = [problem(row, {key: value for key, value in words.items() if key != name}, name) for name in sorted(names)]
    assert not any(found), "\n".join(filter(None, found))


@EACH
def test_a_config_that_says_nothing_is_the_class_s_defaults(row: BlockRow) -> None:
    """All words are left out at once: those that no variant of a row says as well."""
    words = {"model_type": words_of(row)["model_type"]}
    mine = ours(row, words)
    assert mine == theirs(row, words) or isinstance(mine, str)


def test_every_default_is_its_class_s() -> None:
    """The table itself: in the order of the fields, with the same other names, and null only where the class has it."""
    for model_type, known in CONFIG_CLASSES.items():
        same_class = {"kimi_k2": "deepseek_v3", "ernie4_5_vl_moe_bank": "ernie4_5_vl_moe_text"}
        config_class = CONFIG_MAPPING[same_class.get(model_type, model_type)]
        fields = {name: field for name, field in config_class.__dataclass_fields__.items() if name in known.defaults}
        if model_type != "dbrx":  # whose words lie in a config of their own, with no other names
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
def test_null_is_what_the_class_makes_of_it(row: BlockRow) -> None:
    """Held to numbers: where a config comes of a null, the block of transformers runs and computes the same."""
    words = words_of(row)
    renamed = CONFIG_CLASSES[words["model_type"]].renamed
    for name in sorted(words_read(row) | set(renamed)):
        nulled = {**words, name: None}
        mine = ours(row, nulled)
        if isinstance(mine, str):
            assert any(known in mine for known in names_of(words, name)), f"{name}: {mine}"
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
    """Names of attribute_map: alone, beside the class's own name before and after it, and null."""
    words = words_of(row)
    known = CONFIG_CLASSES[words["model_type"]]
    found = []
    for other, name in known.renamed.items():
        value = next((words[own] for own in (name, other) if own in words), None)
        changed = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value
        without = {key: entry for key, entry in words.items() if key not in (name, other)}
        orders = ({other: changed}, {name: value, other: changed}, {other: changed, name: value}, {other: None})
        found += [problem(row, {**without, **order}, other) for order in orders]
    assert not any(found), "\n".join(filter(None, found))


@EACH
def test_an_activation_is_the_one_that_is_named(row: BlockRow) -> None:
    """Those that this version does not know are an error, of a live block too: none is read as another."""
    words = words_of(row)
    for name in sorted(
        words_read(row) & {"hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act", "dense_act_fn"}
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
            "unheard of",
        ):
            mine = ours(row, {**words, name: act})
            wanted = theirs(row, {**words, name: act})
            if wanted is not None or row.family != "qwen4_exp":  # its attention does not take every one
                assert wanted == (None if isinstance(mine, str) else mine), (name, act, mine)


def older_words(config_class: Any) -> set[str]:
    """Words that a class takes beside its fields: what its __post_init__ gets or pops of its keywords."""
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
def test_older_words_are_read_as_the_class_reads_them(row: BlockRow) -> None:
    words = words_of(row)
    found = []
    for name in sorted(older_words(class_of(row)) - set(words)):
        for value in (0, 1, 2, 4, 64, 1.5, False, None, [4, 4], [-1, 2]):
            for base in (
                words,
                {key: entry for key, entry in words.items() if key not in ("mlp_layer_types", "per_layer_config")},
            ):
                changed = {**base, name: value}
                wanted, mine = theirs(row, changed), ours(row, changed)
                if wanted is not None and mine != wanted and not (isinstance(mine, str) and name in mine):
                    found.append(f"{name} = {value}: {difference(mine, wanted)}")
    assert not found, "\n".join(found)
