"""Planted bugs of the lists of modules that a quantized checkpoint leaves in floats."""

import importlib.util
from dataclasses import replace
from typing import Any

from moe_fn.checkpoint import module_patterns
from moe_fn.checkpoint.quantized import methods
from planted.bugs import PlantedBug, before


def _by_rule(rule: module_patterns.ListRule, **changes: Any) -> Any:
    """A bug of is_listed that changes fields of one tool's rule."""
    return before(
        lambda module, entries, asked: (module, entries, replace(asked, **changes) if asked is rule else asked)
    )


def _whole_parts(name: str, entry: str) -> bool:
    return f".{entry.strip('.')}." in f".{name}."


LISTS = "a_list_excludes_what_its_tool_excludes"
BUGS: tuple[PlantedBug, ...] = (
    PlantedBug(
        LISTS, "AutoAWQ's entries match whole parts of names only", module_patterns.is_listed,
        _by_rule(module_patterns.AUTOAWQ, text=_whole_parts)
    ),
    PlantedBug(
        LISTS,
        "an entry of compressed-tensors excludes the submodules too",
        module_patterns.is_listed,
        _by_rule(module_patterns.COMPRESSED_TENSORS, text=lambda name, entry: f"{name}.".startswith(f"{entry}.")),
    ),
    PlantedBug(
        LISTS, "entries of transformers match whole parts of names only", module_patterns.is_listed,
        _by_rule(module_patterns.TRANSFORMERS, text=_whole_parts)
    ),
    PlantedBug(
        LISTS,
        "ModelOpt's globs match linear modules only",
        module_patterns.is_listed,
        _by_rule(module_patterns.MODELOPT, containers=False),
    ),
    PlantedBug(
        "tensors_stored_as_floats_are_floats_whatever_quantization_config_says",
        "only quantization_config decides what is quantized",
        methods.method_of,
        lambda f: lambda words, name, of_experts, **known: f(words, name, of_experts, fused=known.get("fused", False)),
    ),
)  # fmt: skip
if importlib.util.find_spec("safetensors") is None:  # the laws cannot run
    BUGS = ()
