"""Matches module names against the lists in quantization_config, with the rules of the tool that wrote each list."""

import fnmatch
import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_LINEAR = ("Linear", "LinearBase", "FusedMoE")  # class names that stand for experts in lists of targets
_MOST_STEPS = 10**8  # of matching one name against a list: seconds
_GROUP = re.compile(r"\(\?(?:P?<\w+>|[:=!]|<[=!])")
_ONE_CHARACTER = re.compile(r"\\.|\[\^?\]?[^\]]*\]", re.DOTALL)
_OF_EXPRESSIONS = frozenset("\\[](){}^$|?*+")


@dataclass(frozen=True)
class ListRule:
    """The rule by which a tool decides whether a list has a module.

    keys         keys of quantization_config that hold such lists
    text         whether an entry matches the module's name as text
    expression   the regular expression of an entry, matched from the beginning of the name; None if it has none
    containers   whether an entry for the module that holds all experts also matches each expert
    """

    keys: tuple[str, ...]
    text: Callable[[str, str], bool]
    expression: Callable[[str], str | None] = lambda entry: None
    containers: bool = False


def is_listed(module: str, entries: Iterable[str], rule: ListRule) -> bool:
    """Whether a list has a module.

    Raises ValueError for invalid regular expressions, and for those whose matching could take very long, because a
    model's config is not trusted.

    Laws
        A list excludes what its tool excludes.

    >>> is_listed("model.layers.1.mlp.experts.0.gate_proj", ["lm_head", "model.layers.1.mlp.experts"],
    ...     COMPRESSED_TENSORS)
    False
    >>> is_listed("model.layers.1.mlp.experts.0.gate_proj", ["lm_head", "model.layers.1.mlp.experts"], TRANSFORMERS)
    True
    """
    entries = list(entries)
    expressions = [expression for expression in map(rule.expression, entries) if expression is not None]
    names = [module, container] if rule.containers and (container := container_of(module)) else [module]
    if sum(steps_of(expression, module) for expression in expressions) > _MOST_STEPS:
        raise ValueError(
            f"a list of modules in quantization_config, {', '.join(map(repr, entries))!r:.200}, could take very long "
            "to match; expected regular expressions without repeated groups, with few repeats and alternatives"
        )
    return any(
        any(rule.text(name, entry) for entry in entries)
        or any(matches_from_start(expression, name) for expression in expressions)
        for name in names
    )


def target_of(module: str, targets: Iterable[str]) -> str | None:
    """The first of compressed-tensors' targets that matches a linear module: names, then expressions, then classes.

    >>> target_of("mlp.experts.0.up_proj", ["Linear", "re:.*self_attn.*", "re:.*experts.*"])
    're:.*experts.*'
    """
    by_text = sorted(targets, key=lambda target: ("re:" in target, target))
    named = (target for target in by_text if is_listed(module, [target], COMPRESSED_TENSORS))
    return next(named, next((target for target in by_text if target in _LINEAR), None))


def container_of(module: str) -> str:
    """The name of the module that holds all experts, from the name of a module in it; "" if there is none.

    >>> container_of("model.layers.1.mlp.experts.0.up_proj"), container_of("model.layers.1.mlp.shared_experts.up_proj")
    ('model.layers.1.mlp.experts', '')
    """
    before, found, _ = module.rpartition(".experts.")
    return f"{before}.experts" if found else ""


def matches_from_start(expression: str, text: str) -> bool:
    """Whether re.match matches. Raises ValueError for an invalid expression, and for one that could take very long."""
    if steps_of(expression, text) > _MOST_STEPS:
        raise ValueError(
            f"{expression!r:.200} could take very long to match; expected an expression with fewer repeats"
        )
    try:
        return re.match(expression, text) is not None
    except (re.error, OverflowError, RecursionError):
        raise ValueError(
            f"{expression!r:.200} in a list of modules of quantization_config is no regular expression; expected one"
        ) from None


def steps_of(expression: str, text: str) -> float:
    """An upper bound of the steps of a backtracking match: ways to divide the text among the repeats, times ways
    through the alternatives.

    >>> steps_of("model.layers.3", "x" * 9), steps_of(".*", "x" * 9), steps_of(".*a.*", "x" * 9), steps_of("(.*)*",
    ...     "x" * 9)
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


def _after_re(entry: str) -> str | None:
    return entry.removeprefix("re:") if entry.startswith("re:") else None


def _up_to_the_end_of_a_part(entry: str) -> str | None:
    """The expression of an entry in transformers, where every entry is one; None for plain names and invalid
    expressions, which are compared as text.
    """
    if not _OF_EXPRESSIONS & set(entry):
        return None
    expression = rf"(?:{entry})(?:(?<=\.)|(?=\.|$))"
    if steps_of(entry, "") < math.inf:
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError):
            return None
    return expression


def _begins_or_ends(name: str, entry: str) -> bool:
    if name.endswith(entry):
        return True
    end = len(entry)
    if end > len(name) or (name[end - 1 : end] != "." and name[end : end + 1] not in ("", ".")):
        return False
    return all(sign in (other, ".") for sign, other in zip(entry, name, strict=False))


# Source of each rule: compressed-tensors 0.20 (`match_name`), transformers 5.23 (`should_convert_module`), AutoAWQ
# 0.2.7 (`exclude_layers_to_not_quantize` matches substrings; for the same list vLLM looks up the container and
# transformers matches whole components), ModelOpt 0.47 (fnmatch).
COMPRESSED_TENSORS = ListRule(("ignore",), operator.eq, _after_re)
TRANSFORMERS = ListRule(
    ("modules_to_not_convert", "ignored_layers"), _begins_or_ends, _up_to_the_end_of_a_part, containers=True
)
AUTOAWQ = ListRule(("modules_to_not_convert",), operator.contains)
MODELOPT = ListRule(("exclude_modules", "ignore"), fnmatch.fnmatchcase, containers=True)
