"""Laws of reading a config.json: transformers' classes are the oracle, any word may be left out, null or another."""

from typing import Any

import pytest

pytest.importorskip("transformers")

from hypothesis import strategies as st
from support import law
from test_family_files import words_in
from test_family_words import FIRST, Words, block_of, layer_of, names_of, ours, theirs, words_of, words_read
from torch import nn

from moe_fn.families import FAMILIES, config_of_layer, family_of_block
from moe_fn.families.composite import PARTS
from moe_fn.integrations.transformers import from_block
from shared_tests.zoo import ROWS, BlockRow

OF_TYPE = {words_of(row)["model_type"]: row for row in FIRST}
SEVERAL = [outer for outer, parts in PARTS.items() if len(parts) > 1]


def another(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    return {"silu": "gelu", "softmax": "sigmoid"}.get(value, value) if isinstance(value, str) else value * 2


CHANGES = {
    "left out": lambda words, name: {key: value for key, value in words.items() if key != name},
    "null": lambda words, name: {**words, name: None},
    "another": lambda words, name: {
        **words,
        name: another(words[name]) if isinstance(words[name], bool | int | float | str) else words[name],
    },
}


@law(st.sampled_from(FIRST), st.sampled_from(sorted(CHANGES)), st.data())
def test_a_word_is_read_as_its_class_reads_it(row: BlockRow, change: str, data: Any) -> None:
    """What transformers makes of a word is made; where it makes nothing, or for null where its class wants a value, an
    error.
    """
    words = words_of(row)
    name = data.draw(st.sampled_from(sorted(words_read(row) & set(words))))
    said: Words = CHANGES[change](words, name)
    mine, wanted = ours(row, said), theirs(row, said)
    if isinstance(mine, str):
        assert wanted is None or any(known in mine for known in names_of(words, name)), mine
    elif wanted is None:  # its class holds the word against others that are no part of the layer
        assert change != "null", (row.name, name, mine)
    else:
        assert mine == wanted, (row.name, name)


@law(st.sampled_from(SEVERAL), st.data())
def test_a_layer_is_read_with_the_words_of_its_part(outer: str, data: Any) -> None:
    """A model of several parts with experts: the names of a layer's tensors say which part's words are its own."""
    of_parts = [(part, OF_TYPE[part.model_type]) for part in PARTS[outer]]
    words: Words = {"model_type": outer}
    for part, row in of_parts:
        inner: Words = {name: value for name, value in words_of(row).items() if name != "model_type"}
        for name in reversed(part.path):
            inner = {name: inner}
        words |= inner
    part, row = data.draw(st.sampled_from(of_parts))
    prefix = ".".join(
        filter(None, ("model", data.draw(st.sampled_from(part.named or ("", "language_model"))), "layers.1.mlp"))
    )
    assert config_of_layer(words, layer_of(row), prefix) == theirs(row, words_of(row))


@law(
    st.sampled_from(FIRST),
    st.sampled_from(["scoring_func", "score_func", "moe_router_activation", "topk_method"]),
    st.text(max_size=9),
)
def test_a_word_that_names_a_function_is_never_read_as_another(row: BlockRow, name: str, function: str) -> None:
    mine = ours(row, {**words_of(row), name: function})
    assert isinstance(mine, str) and name in mine, (row.name, name, function)


def of_another_kind(value: Any) -> Any:
    """Another value of an attribute of a block."""
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else nn.Mish()


def test_every_attribute_that_a_row_names_is_one_of_a_block_that_goes_before_its_config() -> None:
    named = {name.lstrip(".") for family in FAMILIES for word in words_in(family) for name in word.names if "." in name}
    followed = set()
    for row in (row for row in ROWS if not family_of_block(row.block).refused):
        block = block_of(row, words_of(row)).eval()
        config = from_block(block)[0]
        for name in named - followed:
            owners = {
                module: getattr(module, name) for module in block.modules() if name in vars(module) | module._modules
            }
            for module, value in owners.items():
                setattr(module, name, of_another_kind(value))
            try:
                changed = from_block(block)[0] != config
            except ValueError:  # or it says that it does not know that value
                changed = True
            followed |= {name} if changed else set()
            for module, value in owners.items():
                delattr(module, name)  # a module does not take a function in a module's place
                setattr(module, name, value)
    assert followed == named
