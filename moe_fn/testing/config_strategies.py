"""Hypothesis strategy of MoEConfigs over every option of the layer."""

import dataclasses
import functools
import itertools
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from moe_fn.config import (
    ActivationConfig,
    ActivationName,
    GroupConfig,
    LatentConfig,
    MoEConfig,
    RouterConfig,
    SharedExpertsConfig,
    ZeroExpertsConfig,
)
from moe_fn.config.activation import PRESETS
from moe_fn.testing.option_rules import OPTIONS, Known, custom_activations, goes_with, groups_fit, sizes_of

_ROUTER_FIELDS = tuple(field.name for field in dataclasses.fields(RouterConfig))
_FIELDS = tuple(field.name for field in dataclasses.fields(MoEConfig)) + _ROUTER_FIELDS
_BOOLEANS = st.booleans()


def configs(**fixed: Any) -> SearchStrategy[MoEConfig]:
    """Strategy of valid configs over the whole option space: small and adversarial, shrinking to simple ones.

    Draws every field of MoEConfig, RouterConfig and the nested configs: num_experts 1 to 8, zero experts 0 to 3, top_k
    up to all of them, hidden_size 1 to 12, intermediate_size 1 to 8. Not drawn are `recompute` (the torch back-end
    raises for True) and, unless fixed, norms, quant, lora, parallel and capacity.

    Keywords fix fields to a value or draw them from a strategy: any field of MoEConfig or RouterConfig, or `router` for
    all fields of the latter. The other options are then drawn to be compatible; fields that contradict each other raise
    ValueError. A fixed `groups` or `zero_experts` determines its own sizes, and num_experts and top_k fit it.

    >>> from hypothesis import find
    >>> config = find(configs(chunk_tokens=2, scoring=st.sampled_from(["sigmoid", "identity"])),
    ...     lambda config: config.top_k > 1)
    >>> config.top_k > 1, config.chunk_tokens, config.router.scoring in ("sigmoid", "identity")
    (True, 2, True)
    """
    unknown = sorted(set(fixed) - set(_FIELDS))
    if unknown:
        raise TypeError(f"configs: unknown fields {unknown}; expected fields of MoEConfig or RouterConfig")
    return _configs(
        {name: value if isinstance(value, SearchStrategy) else st.just(value) for name, value in fixed.items()}
    )


@st.composite
def _configs(draw: DrawFn, fixed: dict[str, SearchStrategy[Any]]) -> MoEConfig:
    # lora and quant are not drawn: a draw for them would change all other examples.
    known: Known = {"lora": None, "quant": None} | {name: draw(strategy) for name, strategy in fixed.items()}
    router = known.pop("router", None)
    if router is not None:
        known = {name: getattr(router, name) for name in _ROUTER_FIELDS} | known
    given = frozenset(known)
    _check_given(known)
    for name in OPTIONS:
        if name not in known:
            # Always draw an index, even into one value: Hypothesis prefers fewer draws, so it would shrink towards
            # options that leave the others no choice.
            index = draw(_indices(len(OPTIONS[name])))
            fitting = _fitting(known, name, given)
            known[name] = fitting[index % len(fitting)]
    known["num_experts"], zero_experts, known["top_k"] = draw(_one_of(sizes_of(known)))
    for name, largest in (("hidden_size", 12), ("intermediate_size", 8)):
        if name not in known:
            known[name] = draw(_sizes_up_to(largest))
    _draw_nested(draw, known, zero_experts, given)
    own = {field.name: known[field.name] for field in dataclasses.fields(MoEConfig) if field.name != "router"}
    return MoEConfig(**own, router=RouterConfig(**{name: known[name] for name in _ROUTER_FIELDS}))


def _check_given(known: Known) -> None:
    wrong = [name for name in known if name in OPTIONS and not goes_with(known, name, known[name])]
    if wrong or not sizes_of(known):
        raise ValueError(
            f"configs: the fixed fields {sorted(known)} do not go together{': ' + ', '.join(wrong) if wrong else ''}"
        )


def _fitting(known: Known, name: str, given: frozenset[str]) -> tuple[Any, ...]:
    values = tuple(value for value in OPTIONS[name] if goes_with(known, name, value))
    if not values:
        raise ValueError(f"configs: no {name} goes with the fixed fields {sorted(given)}")
    return values


def _draw_nested(draw: DrawFn, known: Known, zero_experts: int, given: frozenset[str]) -> None:
    """Replaces the kinds of nested configs in `known` by drawn configs."""
    if known["groups"] == "groups":
        known["groups"] = draw(_groups(known["num_experts"] + zero_experts, known["top_k"]))
    if "zero_experts" not in given and known["zero_experts"] is not None:
        known["zero_experts"] = ZeroExpertsConfig(count=zero_experts, kind=known["zero_experts"])
    if "shared" not in given and known["shared"] is not None:
        known["shared"] = draw(_shared(known["shared"]))
    if known["latent"] == "latent":
        known["latent"] = LatentConfig(size=draw(_sizes_up_to(12)), norm_epsilon=draw(_one_of((0.01, 0.5))))
    if "activation" not in given:
        known["activation"] = draw(_activations(known["activation"] == "gated"))


@st.composite
def _shared(draw: DrawFn, gate: Any) -> SharedExpertsConfig:
    return SharedExpertsConfig(
        intermediate_size=draw(_sizes_up_to(8)),
        count=draw(_sizes_up_to(3)),
        gate=gate,
        combine=draw(_one_of(("sum", "average"))),
        activation=draw(_activations(not draw(_BOOLEANS))),
    )


@st.composite
def _groups(draw: DrawFn, choices: int, top_k: int) -> GroupConfig:
    """Strategy of GroupConfigs for a number of choices, in which top_k can be chosen."""
    ways = _ways_to_group(choices, top_k)
    count = draw(_one_of(tuple(ways)))  # drawn first, since there are many more ways for many groups
    return draw(_one_of(ways[count]))  # type: ignore[no-any-return]


@functools.lru_cache
def _ways_to_group(choices: int, top_k: int) -> dict[int, tuple[GroupConfig, ...]]:
    """GroupConfigs by number of groups; one group of all choices, which is always possible, is last."""
    ways: dict[int, tuple[GroupConfig, ...]] = {}
    for count in [count for count in (*range(2, choices + 1), 1) if choices % count == 0]:
        plain = (
            GroupConfig(count=count, top_k=top, score=score, fill=fill)  # type: ignore[arg-type]
            for top, fill, score in itertools.product(range(1, count + 1), ("-inf", "zero"), ("max", "top2_sum"))
        )
        every = (*plain, GroupConfig(count=count, top_k=count, limit="each"))
        ways[count] = tuple(groups for groups in every if groups_fit(groups, choices, top_k))
    return ways


@functools.lru_cache
def _activations(gated: bool) -> SearchStrategy[ActivationConfig | ActivationName]:
    presets = [name for name, activation in PRESETS.items() if activation.gated == gated]
    return st.sampled_from([*presets, *custom_activations()[gated]])


def _one_of(values: tuple[Any, ...]) -> SearchStrategy[Any]:
    return _cached(values, tuple(map(type, values)))


@functools.lru_cache
def _cached(values: tuple[Any, ...], types: tuple[type, ...]) -> SearchStrategy[Any]:
    del types  # part of the cache's key: (0.0,) == (False,)
    return st.sampled_from(values)


@functools.lru_cache
def _indices(count: int) -> SearchStrategy[int]:
    return st.integers(0, count - 1)


@functools.lru_cache
def _sizes_up_to(largest: int) -> SearchStrategy[int]:
    return st.integers(1, largest)
