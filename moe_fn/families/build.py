"""MoEConfig from a family's row and the values of a model's config, or of a live block."""

from collections.abc import Mapping
from typing import Any

from moe_fn.config import (
    ActivationConfig,
    ExpertNormConfig,
    GroupConfig,
    LatentConfig,
    MoEConfig,
    NormsConfig,
    RouterConfig,
    SharedExpertsConfig,
    ZeroExpertsConfig,
)
from moe_fn.families.keys import Lookup, resolve
from moe_fn.families.row import Family, Shared

_NESTED = {
    "latent": LatentConfig,
    "zero_experts": ZeroExpertsConfig,
    "expert_norm": ExpertNormConfig,
    "norms": NormsConfig,
}
_WITH_RENORMALIZE = ("renormalize_epsilon", "renormalize_minimum", "renormalize_order")
_SCORING_KEYS = (
    "scoring_func",
    "score_func",
    "score_function",
    "moe_router_activation_func",
    "moe_router_activation",
    "expert_selection_fn",
)
_BIASED = "noaux_tc"  # selection with a correction bias; dots.llm1 has it as the name of its scoring too


def build_config(
    family: Family,
    lookup: Lookup,
    *,
    sizes: Mapping[str, int],
    shared_width: int | None = None,
    shared_lookup: Lookup | None = None,
) -> MoEConfig:
    """Returns the config of a row.

    sizes: sizes that are known from tensors; other sizes are looked up. shared_width: the width of shared experts
    where it is known from tensors, 0 for none. shared_lookup: the lookup for the activation of shared experts.

    Raises ValueError for a refused family, a missing key, and a value that this version does not know.
    """
    if family.refused:
        raise ValueError(f"{family.names[0]}: {family.refused}")
    size_keys = {name: getattr(family, name) for name in ("num_experts", "top_k", "hidden_size", "intermediate_size")}
    size_values: dict[str, Any] = {
        name: sizes[name] if name in sizes else _size(name, entry, lookup) for name, entry in size_keys.items()
    }
    activation = build_activation(family.activation, lookup)
    return MoEConfig(
        **size_values,
        router=_router(family.router, lookup),
        activation=activation,
        shared=_shared(family.shared, lookup, shared_lookup or lookup, shared_width, activation),
        **{name: _nested(name, entry, lookup) for name, entry in family.layer.items()},
    )


def _size(name: str, entry: Any, lookup: Lookup) -> int:
    size = resolve(entry, lookup)
    if type(size) is not int:
        raise ValueError(f"{entry!r} is {size!r:.80} in the model's config; expected an int, the {name}")
    return size


def build_activation(row: Mapping[str, Any], lookup: Lookup) -> ActivationConfig:
    """Returns the activation of a row's fields."""
    values = resolve(row, lookup)
    values = values.pop("act", {}) | values
    if values.get("limit") is None:
        values.pop("limit_at", None)
    return ActivationConfig(**values)


def _router(row: Mapping[str, Any], lookup: Lookup) -> RouterConfig:
    values = resolve(row, lookup)
    groups = values.pop("groups", None)
    if groups is not None:
        limited = GroupConfig(**groups)
        values["groups"] = limited if limited.count > 1 else None  # one group limits nothing
    if not values.get("renormalize", True):
        values = {name: value for name, value in values.items() if name not in _WITH_RENORMALIZE}
    return RouterConfig(**values)


def _shared(
    row: Shared | None, lookup: Lookup, shared_lookup: Lookup, width: int | None, activation: ActivationConfig
) -> SharedExpertsConfig | None:
    if row is None:
        return None
    count = resolve(row.count, lookup)
    width = resolve(row.width, lookup) if width is None else width
    if not width or not count:
        return None
    return SharedExpertsConfig(
        intermediate_size=width // count,
        count=count,
        gate=row.gate,  # type: ignore[arg-type]
        combine=resolve(row.combine, lookup),
        activation=activation if row.activation is None else build_activation(row.activation, shared_lookup),
    )


def _nested(name: str, entry: Any, lookup: Lookup) -> Any:
    values = resolve(entry, lookup)
    if name not in _NESTED or not isinstance(values, Mapping):
        return values
    enabled = values.get("size", values.get("count", 1))  # a latent space of size 0 or 0 zero experts: None
    return _NESTED[name](**values) if enabled else None


def check_choices(family: Family, config: MoEConfig, values: Mapping[str, Any]) -> None:
    """Raises ValueError where a key names another scoring, selection or kind of zero experts than the config has.

    Rows of families that always compute the same function do not read such keys.
    """
    biased = family.router.get("correction_bias", "none") != "none"
    scorings = (config.router.scoring, *([_BIASED] if biased else []))
    methods = (_BIASED,) if biased else _methods(family, config)
    zero = (config.zero_experts.kind,) if config.zero_experts is not None else ("identity", "zero")
    checked = (*((name, scorings) for name in _SCORING_KEYS), ("topk_method", methods), ("zero_expert_type", zero))
    for name, expected in checked:
        if values.get(name) is not None and values[name] not in expected:
            known = " or ".join(map(repr, expected))
            raise ValueError(
                f"{name} is {values[name]!r:.80} in the model's config; expected {known}, which {family.names[0]} "
                "computes"
            )


def _methods(family: Family, config: MoEConfig) -> tuple[str, ...]:
    """Returns the names of a selection without a correction bias. With one group both names mean the same."""
    if config.router.groups is not None:
        return ("group_limited_greedy",)
    return ("greedy", "group_limited_greedy") if family.router.get("groups") else ("greedy",)
