"""Lists of unquantized modules: which names of a table the matching of each tool excludes, and ours does; the tools run
where they are installed.
"""

import fnmatch
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from quantized_files import FORMATS
from support import law

from moe_fn.checkpoint.module_patterns import container_of
from moe_fn.checkpoint.quantized.methods import method_of

NAMES = {
    "gate": "model.layers.1.mlp.experts.0.gate_proj", "up": "model.layers.1.mlp.experts.0.up_proj",
    "of 10": "model.layers.10.mlp.experts.3.down_proj", "shared": "model.layers.1.mlp.shared_experts.up_proj",
    "w1": "model.layers.1.block_sparse_moe.experts.0.w1", "v4": "layers.1.ffn.experts.7.w2",
    "mtp": "mtp.0.ffn.experts.7.w2",
    "fused": "model.layers.1.mlp.experts.gate_up_proj", "router": "model.layers.1.mlp.gate", "head": "lm_head",
    "inside": "model.language_model.layers.1.mlp.experts.0.up_proj",
}  # fmt: skip
OF_1 = {"gate", "up", "shared", "fused", "router"}  # in model.layers.1.mlp
EXPERTS_OF_1 = {"gate", "up", "fused"}
Row = tuple[list[str], set[str]]  # entries, and the names that they exclude

COMPRESSED_TENSORS: tuple[Row, ...] = (
    (["lm_head"], {"head"}),
    # names match exactly: modules inside them are quantized
    (["model.layers.1.mlp.experts", "model.layers.1.mlp", "model.layers.1"], set()),
    (["model.layers.1.mlp.experts.0.up_proj", "model.layers.1.mlp.gate"], {"up", "router"}),
    ([r"re:.*mlp.gate$"], {"router"}),
    ([r"re:.*mlp.gate"], {"router"}),
    ([r"re:.*up_proj"], {"up", "shared", "fused", "inside"}),
    ([r"re:model\.layers\.1"], {*OF_1, "w1", "of 10"}),  # matches from the start, and may end anywhere
    ([r"re:model\.layers\.1\."], {*OF_1, "w1"}),
    ([r"re:mlp", "*.mlp.*", "mlp"], set()),
    ([r"re:^mtp\..*", r"re:layers\.\d+\.ffn"], {"mtp", "v4"}),
)
AUTOAWQ: tuple[Row, ...] = (
    (["lm_head"], {"head"}),
    (["gate"], {"gate", "fused", "router"}),
    (["mlp.gate."], set()),
    (["mlp.gate.", "model.layers.1."], {*OF_1, "w1", "inside"}),  # matches language_model.layers.1. too
    (["model.layers.1"], {*OF_1, "w1", "of 10", "inside"}),
    (["mlp"], {*OF_1, "of 10", "inside"}),
    (["experts.0", "shared"], {"gate", "up", "w1", "inside", "shared"}),
    (["re:.*", "*", r"model\.layers"], set()),
    (["ayers.1.m"], {*OF_1, "inside"}),
)
TRANSFORMERS: tuple[Row, ...] = (
    (["lm_head"], {"head"}),
    (["gate"], {"router"}),
    (["mlp.gate", "up_proj"], {"router", "up", "shared", "fused", "inside"}),  # matches the end, also of a part
    (["model.layers.1"], {*OF_1, "w1"}),
    (["model.layers.1."], {*OF_1, "w1", "of 10"}),  # "." matches any character, here a 0
    (["model.layers.1.mlp"], OF_1),
    (["mlp", "layers.1.mlp"], set()),
    (["mlp.experts"], {*EXPERTS_OF_1, "of 10", "inside"}),  # the name of their container ends with it
    (["model.layers.1.mlp.experts"], {*EXPERTS_OF_1, "inside"}),
    ([r"model\.layers\.\d+\.mlp"], {*OF_1, "of 10"}),
    (["model.layers.*.mlp.router", "model.layers.*.self_attn"], set()),
    (["model.layers.*.mlp.gate"], {"router"}),
    (["layers|mtp"], {"v4", "mtp"}),
    (["model_layers_1", "m.del.layers.1"], {*OF_1, "w1"}),
)
MODELOPT: tuple[Row, ...] = (
    (["lm_head"], {"head"}),
    (["model.layers.1*"], {*OF_1, "w1", "of 10"}),
    (["model.layers.1.*"], {*OF_1, "w1"}),
    (["model.layers.1", "model.layers.1.mlp", "mlp", "gate"], set()),
    (["*.mlp.gate"], {"router"}),
    (["*gate*"], {"gate", "fused", "router"}),
    (["model.layers.1.mlp.experts*"], EXPERTS_OF_1),
    # a separate module for ModelOpt if it has all experts in one tensor
    (["model.layers.1.mlp.experts"], EXPERTS_OF_1),
    (["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"], {"mtp"}),
    (["model.layers.?.mlp.[eg]*"], {*EXPERTS_OF_1, "router"}),
    ([r"model\.layers", "re:.*"], set()),
)
GPTQ: tuple[Row, ...] = (
    ([r"-:.*\.mlp\..*"], {*OF_1, "of 10", "inside"}),
    ([r"-:model\.layers\.1"], {*OF_1, "w1", "of 10"}),
    (
        [r"+:.*up_proj", r"-:.*experts"],
        {"gate", "of 10", "w1", "v4", "mtp"},
    ),  # the first entry that matches a name is used
    ([r"-:mlp", "mlp"], set()),
    ([r"-:^lm_head$"], {"head"}),
)
TABLES: dict[str, tuple[tuple[Row, ...], Callable[[list[str]], dict[str, Any]]]] = {
    "compressed-tensors": (COMPRESSED_TENSORS, lambda entries: {**FORMATS["ct w4a16"].words, "ignore": entries}),
    "awq": (AUTOAWQ, lambda entries: {**FORMATS["awq"].words, "modules_to_not_convert": entries}),
    "fp8": (TRANSFORMERS, lambda entries: {**FORMATS["deepseek"].words, "modules_to_not_convert": entries}),
    "fp8 of MiniMax": (TRANSFORMERS, lambda entries: {**FORMATS["deepseek"].words, "ignored_layers": entries}),
    "mxfp8": (TRANSFORMERS, lambda entries: {"quant_method": "mxfp8", "modules_to_not_convert": entries}),
    "mxfp4": (TRANSFORMERS, lambda entries: {"quant_method": "mxfp4", "modules_to_not_convert": entries}),
    "modelopt": (MODELOPT, lambda entries: {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": entries}),
    "modelopt's file": (MODELOPT, lambda entries: {"quant_algo": "NVFP4", "exclude_modules": entries}),
    "gptq": (GPTQ, lambda entries: {**FORMATS["gptq"].words, "dynamic": {entry: {} for entry in entries}}),
}


def names_of(left_out: Callable[[str], bool]) -> set[str]:
    return {short for short, name in NAMES.items() if left_out(name)}


@pytest.mark.parametrize("tool", TABLES)
def test_the_table_of_a_tool(tool: str) -> None:
    rows, words_of = TABLES[tool]
    for entries, expected in rows:
        words = words_of(entries)
        assert names_of(lambda name: method_of(words, name, True) is None) == expected, entries  # noqa: B023


def up_to_a_part(name: str, entry: str) -> bool:
    return re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", name) is not None or name.endswith(entry)


# Whether an entry matches a name, in the code of each tool
OF_TOOL: dict[str, Callable[[str, str], bool]] = {
    "compressed-tensors": lambda name, entry: (
        bool(re.match(entry[3:], name)) if entry.startswith("re:") else name == entry
    ),
    "awq": lambda name, entry: entry in name,
    "fp8": lambda name, entry: up_to_a_part(name, entry) or up_to_a_part(container_of(name) or name, entry),
    "modelopt": lambda name, entry: fnmatch.fnmatch(name, entry) or fnmatch.fnmatch(container_of(name) or name, entry),
}


@st.composite
def listed_names(draw: Callable[[Any], Any]) -> tuple[str, str, str]:
    """Draws a name, a piece of it, of its container or of another name, and a prefix for the piece."""
    name, other = draw(st.sampled_from(sorted(NAMES.values()))), draw(st.sampled_from(sorted(NAMES.values())))
    piece = draw(st.sampled_from([name, name, other, container_of(name) or name]))
    parts = [0, *(at.end() for at in re.finditer(r"\.", piece))]
    start, stop = (
        draw(st.sampled_from([*parts, 0, 0, draw(st.integers(0, len(piece)))])),
        draw(st.integers(0, len(piece))),
    )
    stop = draw(st.sampled_from([*(end - 1 for end in parts[1:]), len(piece), stop]))
    return name, piece[start:stop], draw(st.sampled_from(["", "", "*", "re:", "re:*"]))


@law(listed_names(), st.booleans())
def test_a_list_excludes_what_its_tool_excludes(drawn: tuple[str, str, str], any_number: bool) -> None:
    name, piece, before = drawn
    for tool, says in OF_TOOL.items():
        number, start = ("*", before) if tool == "modelopt" else (r"\d+", before.replace("*", ".*"))
        entry = start + (re.sub(r"\d+", lambda _: number, piece) if any_number else piece)  # noqa: B023
        assert (method_of(TABLES[tool][1](["lm_head.", entry]), name, True) is None) == says(name, entry), (
            tool,
            name,
            entry,
        )


def module_of(name: str) -> torch.nn.Module:
    """Returns a model with a linear module of this name."""
    root = torch.nn.Module()
    *parents, last = name.split(".")
    at = root
    for parent in parents:
        at.add_module(parent, torch.nn.Module())
        at = getattr(at, parent)
    at.add_module(last, torch.nn.Linear(2, 2))
    return root


def test_compressed_tensors_leaves_the_same_out() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.utils import match_named_modules

    for entries, expected in COMPRESSED_TENSORS:
        assert expected == names_of(
            lambda name: name not in dict(match_named_modules(module_of(name), ["Linear"], entries))  # noqa: B023
        ), entries


def test_autoawq_leaves_the_same_out() -> None:
    pytest.importorskip("awq")
    from awq.utils.module import exclude_layers_to_not_quantize

    for entries, expected in AUTOAWQ:
        assert expected == names_of(lambda name: not exclude_layers_to_not_quantize({name: None}, entries)), entries  # noqa: B023


def test_transformers_leaves_the_same_out() -> None:
    """transformers checks linear modules, and modules with all experts, by their own names."""
    pytest.importorskip("transformers")
    from transformers.quantizers.quantizers_utils import should_convert_module

    def left_out(name: str, entries: list[str]) -> bool:
        container = container_of(name)
        return not should_convert_module(name, entries) or (
            bool(container) and not should_convert_module(container, entries)
        )

    for entries, expected in TRANSFORMERS:
        assert expected == names_of(lambda name: left_out(name, entries)), entries  # noqa: B023


def test_what_modelopt_summarises_is_left_out_again() -> None:
    """For any split of the names, ModelOpt's globs match the unquantized ones, and no quantized one."""
    pytest.importorskip("modelopt.torch.export.quant_utils")
    from modelopt.torch.export.quant_utils import _prefix_wildcard_summarize_exclude_modules as summary

    linear = {short: name for short, name in NAMES.items() if short != "fused"}
    for bits in range(1, 2 ** len(linear)):
        others = {short for place, short in enumerate(linear) if bits >> place & 1}
        globs = summary(
            [linear[short] for short in others], [name for short, name in linear.items() if short not in others]
        )
        words = {"quant_algo": "FP8", "exclude_modules": sorted(globs)}
        assert {short for short, name in linear.items() if method_of(words, name, True) is None} == others


GROUPS = {
    "a": ["Linear"],
    "b": [r"re:.*experts.*"],
    "c": [r"re:.*up_proj"],
    "d": ["model.layers.1.mlp.experts.0.up_proj"],
}
GROUP_OF_NAME = {"gate": "b", "up": "d", "of 10": "b", "shared": "b", "head": "a", "inside": "b"}


def words_of_groups() -> dict[str, Any]:
    weights = FORMATS["ct w4a16"].words["config_groups"]["group_0"]["weights"]
    sizes = {
        name: {"targets": targets, "weights": weights | {"group_size": 16 * 2**place}}
        for place, (name, targets) in enumerate(GROUPS.items())
    }
    return {**FORMATS["ct w4a16"].words, "config_groups": sizes, "ignore": []}


def test_a_name_says_more_than_an_expression_and_that_more_than_a_class() -> None:
    for short, group in GROUP_OF_NAME.items():
        found = method_of(words_of_groups(), NAMES[short], True)
        assert found is not None and found.quant.group_size == 16 * 2 ** list(GROUPS).index(group), short
    words = words_of_groups()
    words["config_groups"] = {"a": words["config_groups"]["a"] | {"targets": ["MoEGate", "Embedding"]}}
    assert method_of(words, NAMES["up"], True) is None


def test_compressed_tensors_takes_the_same_groups() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    for short, group in GROUP_OF_NAME.items():
        model = module_of(NAMES[short])
        apply_quantization_config(model, QuantizationConfig.model_validate(words_of_groups()))
        assert model.get_submodule(NAMES[short]).quantization_scheme.weights.group_size == 16 * 2 ** list(GROUPS).index(
            group
        ), short


MIXED: tuple[tuple[dict[str, str], str, str | None], ...] = (
    ({"model.layers.1": "FP8", "model.layers.1.mlp": "NVFP4", "model.layers.1.mlp.experts.0": "MXFP8"}, "up", "mxfp8"),
    ({"model.layers.1.mlp.experts": "NVFP4", "model.layers.1": "FP8"}, "up", "nvfp4"),
    (
        {"model.layers.1": "NVFP4", "model.layers.10": "FP8"},
        "of 10",
        "fp8_e4m3",
    ),  # parts between dots, not any substring
    ({"model.layers.1": "NVFP4"}, "of 10", None),
    ({"layers.1.ffn.experts": "nvfp4"}, "v4", "nvfp4"),
    ({"layers.1.ffn.experts": "NVFP4"}, "mtp", None),
    # vLLM and transformers use the opposite order
    ({"language_model.model.layers.1.mlp.experts": "NVFP4"}, "inside", "nvfp4"),
    ({"model.language_model.layers.1.mlp.experts": "NVFP4", "model.language_model.layers.1": "FP8"}, "inside", "nvfp4"),
)


@pytest.mark.parametrize("row", MIXED, ids=lambda row: row[1])
def test_the_innermost_of_nested_names_counts(row: tuple[dict[str, str], str, str | None]) -> None:
    layers, short, scheme = row
    for order in (layers, dict(reversed(layers.items()))):
        words = {
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {name: {"quant_algo": algorithm} for name, algorithm in order.items()},
        }
        found = method_of(words, NAMES[short], True)
        assert (None if found is None else found.quant.scheme) == scheme


def test_optimum_names_what_is_quantized() -> None:
    words = {
        **FORMATS["gptq"].words,
        "modules_in_block_to_quantize": [["self_attn.q_proj"], ["block_sparse_moe.experts.0.w1"]],
    }
    assert names_of(lambda name: method_of(words, name, True) is not None) == {"w1"}
