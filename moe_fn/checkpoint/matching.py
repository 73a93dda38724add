"""Lists of modules in a model's config: names, parts of names, globs and regular expressions."""

import fnmatch
import math
import re
from collections.abc import Iterable

_LINEAR = ("Linear", "LinearBase", "FusedMoE", "MoEGate")  # classes that experts are, for whoever writes such lists
_MOST_STEPS = 10**8  # of a list, for one name: seconds
_GROUP = re.compile(r"\(\?(?:P?<\w+>|[:=!]|<[=!])")
_ONE_CHARACTER = re.compile(r"\\.|\[\^?\]?[^\]]*\]", re.DOTALL)


def is_listed(module: str, patterns: Iterable[str]) -> bool:
    """Whether a list has a module, or one that it is in.

    "re:..." is a regular expression from the name's beginning on, and so is what has a sign that only those have (transformers), up to the
    end of a part; a "*" makes a glob (ModelOpt); anything else is a run of whole parts: "mlp.gate" is not in "mlp.gate_proj".

    Raises ValueError for what is no regular expression, and for those that could take very long: nobody vouches for a model's config.

    >>> is_listed("model.layers.1.mlp.experts.0.gate_proj", ["lm_head", "mlp.gate", "re:.*self_attn.*", "model.layers.0.*"])
    False
    >>> is_listed("model.layers.1.mlp.experts.0.gate_proj", ["model.layers.1.mlp"])
    True
    """
    patterns = list(patterns)
    steps = sum(steps_of(expression, module) for expression in map(_expression, patterns) if expression is not None)
    if steps > _MOST_STEPS:
        raise ValueError(
            f"a list of modules in quantization_config, {', '.join(map(repr, patterns))!r:.200}, could take very long to look through; "
            "expected regular expressions without repeated groups, with few repeats and alternatives"
        )
    return any(_matches(module, pattern) for pattern in patterns)


def is_target(module: str, targets: Iterable[str]) -> bool:
    """Whether a list of targets, which may be classes, has a linear module."""
    targets = list(targets)
    return any(target in _LINEAR for target in targets) or is_listed(module, targets)


def matches_from_start(expression: str, text: str) -> bool:
    """re.match. ValueError for what is no regular expression, and for one that could take very long."""
    if steps_of(expression, text) > _MOST_STEPS:
        raise ValueError(f"{expression!r:.200} could take very long to match; expected an expression with fewer repeats")
    try:
        return re.match(expression, text) is not None
    except (re.error, OverflowError, RecursionError):
        raise ValueError(
            f"{expression!r:.200} is no regular expression; expected one, in the list of modules of quantization_config"
        ) from None


def steps_of(expression: str, text: str) -> float:
    """No fewer steps than a backtracking match takes: ways to share the text out among the repeats, times ways through the alternatives.

    >>> steps_of("model.layers.3", "x" * 9), steps_of(".*", "x" * 9), steps_of(".*a.*", "x" * 9), steps_of("(.*)*", "x" * 9)
    (1.0, 10.0, 55.0, inf)
    """
    plain = _GROUP.sub("(", _ONE_CHARACTER.sub("a", expression))
    if re.search(r"\)[*+{]", plain) or "(?" in plain:
        return math.inf
    plain = re.sub(r"([*+?}])[?+]", r"\1", plain)  # lazy, or possessive
    repeats, optional, alternatives = sum(map(plain.count, "*+{")), plain.count("?"), plain.count("|")
    if repeats > 10 or optional + alternatives > 1000:
        return math.inf
    ways, inside = 1.0, [0]
    for sign in plain:
        if sign == "(":
            inside.append(0)
        elif sign == "|":
            inside[-1] += 1
        elif sign == ")" and len(inside) > 1:
            ways *= inside.pop() + 1
    return math.comb(len(text) + repeats, repeats) * ways * math.prod(found + 1 for found in inside) * 2.0**optional


def _expression(pattern: str) -> str | None:
    """The regular expression that an entry is, if it is one."""
    if pattern.startswith("re:"):
        return pattern[3:]
    if pattern.startswith(".*") or set(pattern) & set("\\[(+^$|?"):
        return rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))"
    return None


def _matches(module: str, pattern: str) -> bool:
    expression = _expression(pattern)
    if expression is not None:
        return matches_from_start(expression, module)
    if "*" in pattern:
        return fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(module, f"{pattern}.*")
    return f".{pattern}." in f".{module}."
