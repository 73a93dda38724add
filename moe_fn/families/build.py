"""From a family's row and a way to look words up to a MoEConfig."""

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
from moe_fn.families.row import Family, Shared
from moe_fn.families.words import Look, resolve

_NESTED = {
    "latent": LatentConfig,
    "zero_experts": ZeroExpertsConfig,
    "expert_norm": ExpertNormConfig,
    "norms": NormsConfig,
}
_WITH_RENORMALIZE = ("renormalize_epsilon", "renormalize_minimum", "renormalize_order")


def build_config(
    family: Family,
    look: Look,
    *,
    sizes: Mapping[str, int],
    shared_width: int | None = None,
    shared_look: Look | None = None,
) -> MoEConfig:
    """The config that a row stands for; sizes (and the width of shared experts, 0: none) where they are known better
    than by words.

    Raises ValueError for a refused family, a missing word, and a value that this version does not know.
    """
    if family.refused:
        raise ValueError(f"{family.names[0]}: {family.refused}")
    by_words = {name: getattr(family, name) for name in ("num_experts", "top_k", "hidden_size", "intermediate_size")}
    of_layer: dict[str, Any] = {
        name: sizes[name] if name in sizes else _size(name, value, look) for name, value in by_words.items()
    }
    activation = build_activation(family.activation, look)
    return MoEConfig(
        **of_layer,
        router=_router(family.router, look),
        activation=activation,
        shared=_shared(family.shared, look, shared_look or look, shared_width, activation),
        **{name: _nested(name, value, look) for name, value in family.layer.items()},
    )


def _size(name: str, word: Any, look: Look) -> int:
    size = resolve(word, look)
    if type(size) is not int:
        raise ValueError(f"{word!r} is {size!r:.80} in the model's config; expected a whole number, the {name}")
    return size


def build_activation(row: Mapping[str, Any], look: Look) -> ActivationConfig:
    """The activation that a row stands for."""
    values = resolve(row, look)
    values = values.pop("act", {}) | values
    if values.get("limit") is None:
        values.pop("limit_at", None)
    return ActivationConfig(**values)


def _router(row: Mapping[str, Any], look: Look) -> RouterConfig:
    values = resolve(row, look)
    groups = values.pop("groups", None)
    if groups is not None:
        limited = GroupConfig(**groups)
        values["groups"] = limited if limited.count > 1 else None  # of one group that one is kept
    if not values.get("renormalize", True):
        values = {name: value for name, value in values.items() if name not in _WITH_RENORMALIZE}
    return RouterConfig(**values)


def _shared(
    row: Shared | None, look: Look, shared_look: Look, width: int | None, activation: ActivationConfig
) -> SharedExpertsConfig | None:
    if row is None:
        return None
    count = resolve(row.count, look)
    width = resolve(row.width, look) if width is None else width
    if not width or not count:
        return None
    return SharedExpertsConfig(
        intermediate_size=width // count,
        count=count,
        gate=row.gate,  # type: ignore[arg-type]
        combine=resolve(row.combine, look),
        activation=activation if row.activation is None else build_activation(row.activation, shared_look),
    )


def _nested(name: str, value: Any, look: Look) -> Any:
    values = resolve(value, look)
    if name not in _NESTED or not isinstance(values, Mapping):
        return values
    wanted = values.get("size", values.get("count", 1))  # a latent space of no size, no zero experts: there are none
    return _NESTED[name](**values) if wanted else None
