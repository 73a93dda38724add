"""Bugs planted in what quantized files' lists of modules leave out, and in what their tensors say."""

import importlib.util
from dataclasses import replace
from typing import Any

from moe_fn.checkpoint import module_patterns
from moe_fn.checkpoint.quantized import methods
from planted.bugs import PlantedBug, before


def _by_rule(rule: module_patterns.ListRule, **changes: Any) -> Any:
    """is_listed with other columns of one tool's rule."""
    return before(
        lambda module, entries, asked: (module, entries, replace(asked, **changes) if asked is rule else asked)
    )


def _whole_parts(name: str, entry: str) -> bool:
    return f".{entry.strip('.')}." in f".{name}."


LISTS = "a_list_excludes_what_its_tool_excludes"
BUGS: tuple[PlantedBug, ...] = (
    PlantedBug(
        LISTS, "AutoAWQ's entries are whole parts of names", module_patterns.is_listed,
        _by_rule(module_patterns.AUTOAWQ, text=_whole_parts)
    ),
    PlantedBug(
        LISTS,
        "compressed-tensors leaves out what is in a module",
        module_patterns.is_listed,
        _by_rule(module_patterns.COMPRESSED_TENSORS, text=lambda name, entry: f"{name}.".startswith(f"{entry}.")),
    ),
    PlantedBug(
        LISTS, "transformers looks at no ends", module_patterns.is_listed,
        _by_rule(module_patterns.TRANSFORMERS, text=_whole_parts)
    ),
    PlantedBug(
        LISTS,
        "ModelOpt's globs are of linear modules alone",
        module_patterns.is_listed,
        _by_rule(module_patterns.MODELOPT, containers=False),
    ),
    PlantedBug(
        "tensors_stored_as_floats_are_floats_whatever_quantization_config_says",
        "quantization_config alone says what is quantized",
        methods.method_of,
        lambda f: lambda words, name, of_experts, **known: f(words, name, of_experts, fused=known.get("fused", False)),
    ),
)  # fmt: skip
if importlib.util.find_spec("safetensors") is None:  # the laws cannot run
    BUGS = ()
