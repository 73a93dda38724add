"""Lists of modules in a model's config: names, parts of names, globs and regular expressions."""

import fnmatch
import re
from collections.abc import Iterable

_LINEAR = ("Linear", "LinearBase", "FusedMoE", "MoEGate")  # classes that experts are, for whoever writes such lists


def is_listed(module: str, patterns: Iterable[str]) -> bool:
    """Whether a list has a module, or one that it is in.

    "re:..." is a regular expression from the name's beginning on, and so is what has a sign that only those have (transformers), up to the
    end of a part; a "*" makes a glob (ModelOpt); anything else is a run of whole parts: "mlp.gate" is not in "mlp.gate_proj".

    >>> is_listed("model.layers.1.mlp.experts.0.gate_proj", ["lm_head", "mlp.gate", "re:.*self_attn.*", "model.layers.0.*"])
    False
    >>> is_listed("model.layers.1.mlp.experts.0.gate_proj", ["model.layers.1.mlp"])
    True
    """
    return any(_matches(module, pattern) for pattern in patterns)


def is_target(module: str, targets: Iterable[str]) -> bool:
    """Whether a list of targets, which may be classes, has a linear module."""
    return any(target in _LINEAR or _matches(module, target) for target in targets)


def _matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return _regex(pattern[3:], module)
    if pattern.startswith(".*") or set(pattern) & set("\\[(+^$|?"):
        return _regex(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module)
    if "*" in pattern:
        return fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(module, f"{pattern}.*")
    return f".{pattern}." in f".{module}."


def _regex(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error:
        raise ValueError(f"{pattern!r} is no regular expression; expected one, in the list of modules of quantization_config") from None
