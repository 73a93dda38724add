"""Pairwise coverage of options: the pairs of values that problems had together, of those that the rules allow."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from campaign.features import Features, name_of
from moe_fn.config.activation import PRESETS
from moe_fn.config.quant import ACTIVATION_SCHEMES, SCHEMES
from moe_fn.testing.option_rules import OPTIONS, custom_activations, goes_with

Pair = tuple[str, str, str, str]  # option, value, other option, its value

# Options whose values in OPTIONS are kinds, with the names of the features.
_NOT_DRAWN = ("batch_invariant", "norms", "quant", "parallel", "lora", "capacity", "recompute", "activation")
_KINDS: dict[str, dict[str, Any]] = {
    "groups": {"None": None, "groups": "groups", "each": "groups"},
    "expert_norm": {"None": None} | {norm.scale: norm for norm in OPTIONS["expert_norm"] if norm is not None},
    "latent": {"None": None, "latent": "latent"},
    "hidden_padding": {"0": 0, "some": 1},
}
_NORMS = tuple("+".join(names) for n in (1, 2, 3) for names in itertools.combinations(("input", "gate", "output"), n))
_PLAIN = tuple(name for name, activation in PRESETS.items() if not activation.gated) + tuple(
    map(name_of, custom_activations()[False])
)
_GATED = tuple(name for name, activation in PRESETS.items() if activation.gated) + tuple(
    map(name_of, custom_activations()[True])
)
_BEYOND: dict[str, tuple[str, ...]] = {
    "dtype": ("float64", "float32", "bfloat16", "float16"),
    "tokens": ("0", "1", "2-7", "8-17"),
    "dims": ("flat", "batch"),
    "padding": ("none", "some", "all"),
    "inputs of size": ("0", "small", "near 1", "large"),
    "logits": ("gate", "given"),
    "biases": ("False", "True"),
    "activation": tuple(dict.fromkeys(_GATED + _PLAIN)),
    "capacity": ("None", "some"),
    "norms": ("None", *_NORMS),
    "lora": ("None", "each", "shared", "outer_shared"),
    "quant": ("None", *SCHEMES),
    "quant granularity": ("None", "tensor", "channel", "group", "block"),
    "zero_points": ("False", "True"),
    "inputs": ("None", *ACTIVATION_SCHEMES),
    "inputs granularity": ("None", "tensor", "tensor static", "token", "group", "group static"),
}


def _kinds(name: str) -> dict[str, Any]:
    return _KINDS[name] if name in _KINDS else {str(value): value for value in OPTIONS[name]}


_DRAWN = tuple(name for name in OPTIONS if name not in _NOT_DRAWN)
AXES: dict[str, tuple[str, ...]] = _BEYOND | {name: tuple(_kinds(name)) for name in _DRAWN}


def _narrow(dtype: str, where: str) -> bool:
    return dtype not in ("bfloat16", "float16") or where == "float32"


def _granularity(quant: str, granularity: str) -> bool:
    return (quant == "None") == (granularity == "None") and (
        quant == "None" or granularity in SCHEMES[quant].granularities
    )


def _inputs(quant: str, inputs: str) -> bool:
    return inputs == "None" or (quant != "None" and inputs in SCHEMES[quant].activations)


def _inputs_granularity(inputs: str, granularity: str) -> bool:
    name, _, static = granularity.partition(" ")
    if inputs == "None" or name == "None":
        return inputs == name
    return name in ACTIVATION_SCHEMES[inputs].granularities and (not static or name == "tensor" or inputs == "nvfp4")


def _through_quant(granularity: str, inputs: str) -> bool:
    """Whether some scheme has weights of this granularity and inputs of that scheme."""
    return any(_granularity(quant, granularity) and _inputs(quant, inputs) for quant in ("None", *SCHEMES))


# Pairs that OPTIONS does not have: excluded by `drawing`, or by requirements of codes.
_RULES: dict[tuple[str, str], Callable[[str, str], bool]] = {
    ("dtype", "gate_dtype"): _narrow,
    ("dtype", "score_dtype"): _narrow,
    ("tokens", "padding"): lambda tokens, padding: padding != "some" or tokens != "0",
    ("tokens", "inputs of size"): lambda tokens, size: tokens != "0" or size == "0",
    ("padding", "inputs of size"): lambda padding, size: padding != "all" or size == "0",
    ("inputs of size", "logits"): lambda size, logits: size not in ("small", "large") or logits == "given",
    ("activation", "gate_up_layout"): lambda activation, layout: layout == "packed" or activation in _GATED,
    ("norms", "gate_input"): lambda norms, seen: seen == "original" or "gate" not in norms,
    ("quant", "quant granularity"): _granularity,
    ("quant", "zero_points"): lambda quant, zero: zero == "False" or (quant != "None" and SCHEMES[quant].zero_points),
    ("quant granularity", "zero_points"): lambda granularity, zero: zero == "False" or granularity != "None",
    ("quant", "inputs"): _inputs,
    ("quant granularity", "inputs"): _through_quant,
    ("zero_points", "inputs"): lambda zero, inputs: zero == "False" or inputs in ("None", "int8", "fp8_e4m3"),
    ("inputs", "inputs granularity"): _inputs_granularity,
    ("quant", "weight_layout"): lambda quant, layout: quant == "None" or layout == "out_in",
    ("quant granularity", "weight_layout"): lambda granularity, layout: granularity == "None" or layout == "out_in",
    ("zero_points", "weight_layout"): lambda zero, layout: zero == "False" or layout == "out_in",
    ("inputs", "weight_layout"): lambda inputs, layout: inputs == "None" or layout == "out_in",
    ("inputs granularity", "weight_layout"): lambda granularity, layout: granularity == "None" or layout == "out_in",
    ("inputs granularity", "chunk_tokens"): lambda granularity, chunk: granularity != "tensor" or chunk == "None",
}


def _through(quant: str, inputs: str, granularity: str) -> bool:
    return _inputs(quant, inputs) and _inputs_granularity(inputs, granularity)


def allowed(option: str, value: str, other: str, its: str) -> bool:
    """Whether a config may have two values together.

    >>> allowed("quant", "int4", "weight_layout", "in_out"), allowed("selection", "hash", "groups", "each")
    (False, False)
    """
    rule = _RULES.get((option, other))
    if rule is not None:
        return rule(value, its)
    if {option, other} == {"quant", "inputs granularity"}:
        return any(_through(value, inputs, its) for inputs in ("None", *ACTIVATION_SCHEMES))
    if {option, other} == {"quant granularity", "inputs granularity"}:
        return any(
            _granularity(q, value) and _through(q, i, its)
            for q in ("None", *SCHEMES)
            for i in ("None", *ACTIVATION_SCHEMES)
        )
    if {option, other} == {"zero_points", "inputs granularity"}:
        return value == "False" or its != "group static"
    if option in _DRAWN and other in _DRAWN:
        return any(
            _go_together(selection, option, value, other, its) for selection in dict.fromkeys(OPTIONS["selection"])
        )
    return True


def _go_together(selection: str, option: str, value: str, other: str, its: str) -> bool:
    """Whether both values are allowed with a selection of experts, which many options require, and with each other."""
    one, two = _kinds(option)[value], _kinds(other)[its]
    if any(name == "selection" and what != selection for name, what in ((option, value), (other, its))):
        return False
    known = {"selection": selection}
    return goes_with(known, option, one) and goes_with(known, other, two) and goes_with({option: one}, other, two)


@dataclass(frozen=True)
class Coverage:
    """met: how often each pair occurred; possible, excluded: numbers of pairs that the rules allow and forbid; missing:
    allowed pairs that never occurred.
    """

    met: Counter[Pair]
    possible: int
    excluded: int
    missing: tuple[Pair, ...]
    forbidden_but_met: tuple[Pair, ...]


def pairs_of(features: Features) -> list[Pair]:
    """Returns every pair of options of one problem, with its values."""
    known = [(name, features[name]) for name in AXES if name in features]
    return [(*one, *other) for one, other in itertools.combinations(known, 2)]


def coverage_of(problems: Sequence[Features]) -> Coverage:
    """Returns the coverage of these problems."""
    met = Counter(pair for features in problems for pair in pairs_of(features))
    every = [
        (option, value, other, its)
        for option, other in itertools.combinations(AXES, 2)
        for value in AXES[option]
        for its in AXES[other]
    ]
    possible = {pair for pair in every if allowed(*pair)}
    return Coverage(
        met=met,
        possible=len(possible),
        excluded=len(every) - len(possible),
        missing=tuple(sorted(pair for pair in possible if pair not in met)),
        forbidden_but_met=tuple(sorted(pair for pair in met if pair not in possible)),
    )
