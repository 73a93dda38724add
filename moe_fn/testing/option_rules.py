"""Tables of option values and of their compatibility, from which `configs()` draws valid MoEConfigs.

Options are drawn one after another, each from the values compatible with those known before: fields fixed by the
caller, and options drawn earlier. Nested configs are represented by their kind ("groups", "latent", the gate of the
shared experts, ...) until they are drawn.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

from moe_fn.config import (
    ActivationConfig,
    ExpertNormConfig,
    GroupConfig,
    QuantConfig,
    SharedExpertsConfig,
    ZeroExpertsConfig,
    as_activation,
)
from moe_fn.config.activation import FUNCTIONS, PRESETS
from moe_fn.config.router import SCORINGS

Known = dict[str, Any]

# Values of each option, in the order of drawing; the first is the simplest, and Hypothesis shrinks towards it.
# Multipliers and softcaps are those for which values.py guarantees that scores tie exactly or differ clearly.
OPTIONS: dict[str, Collection[Any]] = {
    "selection": ("top_k", "top_k", "top_k", "hash", "sparsemixer"),
    "groups": (None, None, "groups"),
    "weight_on": ("output", "output", "input"),
    "scoring": SCORINGS,
    "scoring_order": ("before_top_k", "after_top_k"),
    "correction_bias": ("none", "scores", "logits"),
    "renormalize": (True, False),
    "renormalize_epsilon": (0.0, 1e-20, 0.25),
    "renormalize_minimum": (0.0, 1e-12, 0.7),
    "renormalize_order": (1.0, 2.0, 3.0),
    "zero_experts": (None, None, "identity", "zero", "constant"),
    "shared": (None, "none", "sigmoid", "router"),
    "scale_on": ("weights", "output", "output_float16_safe"),
    "routed_scaling_factor": (1.0, 2.5, 0.5),
    "logit_multiplier": (1.0, 0.5, 0.75),
    "logit_softcap": (None, 5.0, 2.0),
    "sparsemixer_epsilon": (0.01, 0.07, 0.23),  # no ratio of grid logits comes near twice these
    "gate_dtype": ("float32", "input"),
    "score_dtype": ("float32", "input"),
    "latent": (None, "latent"),
    "hidden_padding": (0, 0, 1, 3),
    "gate_input": ("original", "transformed"),
    "activation": ("gated", "plain"),
    "gate_up_layout": ("packed", "interleaved"),
    "weight_layout": ("out_in", "in_out"),
    # Epsilons are large: small ones multiply the rounding error of a tiny vector by 1/sqrt(epsilon), and would have no
    # visible effect on results.
    "expert_norm": (None, ExpertNormConfig(epsilon=0.01), ExpertNormConfig(epsilon=0.5, scale="before")),
    "chunk_tokens": (None, None, None, 1, 2, 3, 8),
    "backend": ("auto", "torch"),  # not "native", which raises for float64
    "opaque": (False, False, True),
    "norms": (None,),  # not drawn: a norm of the output breaks the laws of sums; fix it to test it
    "quant": (None,),  # not drawn: codes have no gradients, which many laws test; `quants` draws them
    "parallel": (None,),  # not drawn: it needs ranks
    "lora": (None,),  # not drawn: fix it to test it
    "capacity": (None,),  # not drawn: with it a token depends on those before it
    "recompute": (False,),  # not True: the torch back-end raises for it
    "batch_invariant": (False, False, True),
}


def goes_with(known: Known, name: str, value: Any) -> bool:
    """Whether `value` of option `name` is compatible with the known options.

    >>> goes_with({"selection": "sparsemixer"}, "renormalize", True)
    False
    """
    known = {**known, name: value}
    rules = (
        rule
        for names, rule in _RULES
        if name in names and all(other in known for other in names) and not _holds(rule, names, known)
    )
    return next(rules, None) is None and (name not in _RULES_OF_SIZES or bool(sizes_of(known)))


def sizes_of(known: Known) -> tuple[tuple[int, int, int], ...]:
    """All (num_experts, zero experts, top_k) compatible with the known options, for num_experts 1 to 8.

    >>> sizes_of({"num_experts": 1, "top_k": 2, "zero_experts": "identity"})
    ((1, 1, 2), (1, 2, 2), (1, 3, 2))
    """
    two = known.get("selection") == "sparsemixer"
    zero = known.get("zero_experts", "unknown")
    counts = (
        {None: (0,), "unknown": (0, 1, 2, 3)}.get(zero, (1, 2, 3))
        if not isinstance(zero, ZeroExpertsConfig)
        else (zero.count,)
    )
    counts = (0,) if known.get("weight_on") == "input" else counts  # zero experts bypass the experts' inputs
    groups = known.get("groups")
    fixed = groups if isinstance(groups, GroupConfig) else None
    return _sizes(known.get("num_experts"), counts, known.get("top_k"), two, fixed)


@functools.lru_cache
def _sizes(
    experts: int | None, zeros: tuple[int, ...], top_k: int | None, two: bool, groups: GroupConfig | None
) -> tuple[tuple[int, int, int], ...]:
    wanted = [k for k in ([top_k] if top_k else range(1, 12)) if not two or k == 2]
    every = ((e, z, k) for k in wanted for e in ([experts] if experts else range(1, 9)) for z in zeros)
    return tuple((e, z, k) for e, z, k in every if k <= e + z and (groups is None or groups_fit(groups, e + z, k)))


def groups_fit(groups: GroupConfig, choices: int, top_k: int) -> bool:
    """Whether the number of choices splits into these groups and top_k can be chosen in them."""
    if choices % groups.count or (groups.score == "top2_sum" and choices < 2 * groups.count):
        return False
    return top_k <= groups.top_k * (choices // groups.count) and (groups.limit == "groups" or top_k % groups.count == 0)


def _gate(shared: SharedExpertsConfig | str | None) -> str | None:
    return shared.gate if isinstance(shared, SharedExpertsConfig) else shared


def _rounds_by_call(quant: QuantConfig | None) -> bool:
    return quant is not None and quant.rounds_by_call


def _gated(activation: Any) -> bool:
    return activation == "gated" or (activation != "plain" and as_activation(activation).gated)


def _default_unless(needed: Any, default: Any) -> Callable[[Any, Any], bool]:
    return lambda value, other: other == needed or value == default


def _holds(rule: Callable[..., bool], names: tuple[str, ...], known: Known) -> bool:
    return rule(*(known[name] for name in names))


_RULES_OF_SIZES = ("selection", "weight_on", "zero_experts")
# The constraints of `RouterConfig` and `MoEConfig`, each a function of the options that it names. Consequences of two
# constraints are listed too (no renormalize_order with sparsemixer), so that every later option keeps a valid value.
_RULES: tuple[tuple[tuple[str, ...], Callable[..., bool]], ...] = (
    (("selection", "scoring"), lambda selection, scoring: selection != "sparsemixer" or scoring == "softmax"),
    (("selection", "scoring_order"), lambda selection, order: selection != "sparsemixer" or order == "before_top_k"),
    (("selection", "renormalize"), lambda selection, renormalize: selection != "sparsemixer" or not renormalize),
    (("selection", "shared"), lambda selection, shared: selection != "sparsemixer" or _gate(shared) != "router"),
    (("sparsemixer_epsilon", "selection"), _default_unless("sparsemixer", 0.01)),
    (("renormalize_epsilon", "selection"), lambda epsilon, selection: selection != "sparsemixer" or epsilon == 0.0),
    (("renormalize_minimum", "selection"), lambda minimum, selection: selection != "sparsemixer" or minimum == 0.0),
    (("renormalize_order", "selection"), lambda order, selection: selection != "sparsemixer" or order == 1.0),
    (("correction_bias", "selection"), _default_unless("top_k", "none")),
    (("groups", "selection"), _default_unless("top_k", None)),
    (("groups", "scoring_order"), _default_unless("before_top_k", None)),
    (("groups", "correction_bias"), lambda groups, bias: groups is None or bias != "logits"),
    (("renormalize_epsilon", "renormalize"), _default_unless(True, 0.0)),
    (("renormalize_minimum", "renormalize"), _default_unless(True, 0.0)),
    (("renormalize_order", "renormalize"), _default_unless(True, 1.0)),
    (("scoring", "shared"), lambda scoring, shared: SCORINGS[scoring] or _gate(shared) != "router"),
    (("zero_experts", "weight_on"), _default_unless("output", None)),
    (("zero_experts", "scale_on"), _default_unless("weights", None)),
    (("scale_on", "routed_scaling_factor"), lambda scale_on, factor: scale_on == "weights" or factor != 0.0),
    (
        ("gate_input", "latent", "hidden_padding"),
        lambda seen, latent, pad: seen == "original" or latent is not None or pad > 0,
    ),
    (("batch_invariant", "renormalize_order"), lambda invariant, order: not invariant or order in (1.0, 2.0)),
    (("batch_invariant", "capacity"), _default_unless(None, False)),
    (("batch_invariant", "quant"), lambda invariant, quant: not invariant or not _rounds_by_call(quant)),
    (("batch_invariant", "parallel"), _default_unless(None, False)),
    (("gate_up_layout", "activation"), lambda layout, activation: layout == "packed" or _gated(activation)),
)


def custom_activations() -> dict[bool, tuple[ActivationConfig, ...]]:
    """Activations that are no presets, by whether they are gated; limits are low enough to act on values near 1."""
    gated = (
        ActivationConfig(limit=0.5),
        ActivationConfig(limit=0.25, limit_at="output"),
        ActivationConfig(alpha=1.702, up_offset=1.0, limit=1.0),
        ActivationConfig(function="situ", gate_cap=1.5, up_cap=2.0),
        ActivationConfig(function="situ", gate_cap=4.0),
        ActivationConfig(function="gelu_tanh", up_cap=0.75, up_offset=-0.5),
        ActivationConfig(function="relu2", limit=0.5, limit_at="output"),
        ActivationConfig(function="gelu", limit=0.75, up_offset=0.5),
    )
    plain = (ActivationConfig(gated=False, alpha=1.702), ActivationConfig(function="situ", gated=False, gate_cap=1.5))
    return {True: (*gated, *_other_functions(gated, True)), False: (*plain, *_other_functions(plain, False))}


def _other_functions(drawn: tuple[ActivationConfig, ...], gated: bool) -> list[ActivationConfig]:
    """Activations with the functions that no preset has and that are not in `drawn`, with their parameters."""
    known = {a.function for a in (*PRESETS.values(), *drawn) if a.gated == gated}
    return [
        ActivationConfig(function=name, gated=gated, **dict.fromkeys(parameters, 1.5))  # type: ignore[arg-type]
        for name, parameters in FUNCTIONS.items()
        if name not in known
    ]
