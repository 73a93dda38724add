"""Laws of config_of_layer: transformers' config classes are the oracle; any key may be missing, null or changed."""

from typing import Any

import pytest

pytest.importorskip("transformers")

from hypothesis import strategies as st
from support import law
from test_family_files import keys_in
from test_family_keys import FIRST, ConfigValues, block_of, keys_read, layer_of, names_of, ours, theirs, values_of
from torch import nn

from moe_fn.families import FAMILIES, config_of_layer, family_of_block
from moe_fn.families.find import PARTS
from moe_fn.integrations.transformers import from_block
from shared_tests.zoo import ROWS, BlockRow

OF_TYPE = {values_of(row)["model_type"]: row for row in FIRST}
SEVERAL = [outer for outer, parts in PARTS.items() if len(parts) > 1]


def another(value: Any) -> Any:
    """Returns another value of the same type."""
    if isinstance(value, bool):
        return not value
    return {"silu": "gelu", "softmax": "sigmoid"}.get(value, value) if isinstance(value, str) else value * 2


CHANGES = {
    "missing": lambda values, name: {key: value for key, value in values.items() if key != name},
    "null": lambda values, name: {**values, name: None},
    "another": lambda values, name: {
        **values,
        name: another(values[name]) if isinstance(values[name], bool | int | float | str) else values[name],
    },
}


@law(st.sampled_from(FIRST), st.sampled_from(sorted(CHANGES)), st.data())
def test_a_key_is_read_as_its_class_reads_it(row: BlockRow, change: str, data: Any) -> None:
    """The config is transformers'; where transformers raises, or for null where its class needs a value, an error."""
    values = values_of(row)
    name = data.draw(st.sampled_from(sorted(keys_read(row) & set(values))))
    changed: ConfigValues = CHANGES[change](values, name)
    mine, wanted = ours(row, changed), theirs(row, changed)
    if isinstance(mine, str):
        assert wanted is None or any(known in mine for known in names_of(values, name)), mine
    elif wanted is None:  # its class checks the key against keys of other layers
        assert change != "null", (row.name, name, mine)
    else:
        assert mine == wanted, (row.name, name)


@law(st.sampled_from(SEVERAL), st.data())
def test_a_layer_is_read_with_the_values_of_its_part(outer: str, data: Any) -> None:
    """A model of several parts with experts: the prefix of a layer's tensors selects the config of its part."""
    of_parts = [(part, OF_TYPE[model_type]) for model_type, part in PARTS[outer]]
    values: ConfigValues = {"model_type": outer}
    for part, row in of_parts:
        inner: ConfigValues = {name: value for name, value in values_of(row).items() if name != "model_type"}
        for name in reversed(part.path):
            inner = {name: inner}
        values |= inner
    part, row = data.draw(st.sampled_from(of_parts))
    prefix = ".".join(
        filter(None, ("model", data.draw(st.sampled_from(part.named or ("", "language_model"))), "layers.1.mlp"))
    )
    assert config_of_layer(values, layer_of(row), prefix) == theirs(row, values_of(row))


@law(
    st.sampled_from(FIRST),
    st.sampled_from(["scoring_func", "score_func", "moe_router_activation", "topk_method"]),
    st.text(max_size=9),
)
def test_a_key_that_names_a_function_is_never_read_as_another(row: BlockRow, name: str, function: str) -> None:
    mine = ours(row, {**values_of(row), name: function})
    assert isinstance(mine, str) and name in mine, (row.name, name, function)


def of_another_kind(value: Any) -> Any:
    """Returns another value for an attribute of a block."""
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else nn.Mish()


def test_every_attribute_that_a_row_names_overrides_the_config_of_a_block() -> None:
    named = {name.lstrip(".") for family in FAMILIES for key in keys_in(family) for name in key.names if "." in name}
    followed = set()
    for row in (row for row in ROWS if not family_of_block(row.block).refused):
        block = block_of(row, values_of(row)).eval()
        config = from_block(block)[0]
        for name in named - followed:
            owners = {
                module: getattr(module, name) for module in block.modules() if name in vars(module) | module._modules
            }
            for module, value in owners.items():
                setattr(module, name, of_another_kind(value))
            try:
                changed = from_block(block)[0] != config
            except ValueError:  # the value is unknown
                changed = True
            followed |= {name} if changed else set()
            for module, value in owners.items():
                delattr(module, name)  # nn.Module refuses a function in place of a module
                setattr(module, name, value)
    assert followed == named
