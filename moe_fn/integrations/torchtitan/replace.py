"""Replaces torchtitan's experts and dispatchers in a built model."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from moe_fn.integrations.torchtitan.dispatcher import config_of_dispatcher, dispatcher_class
from moe_fn.integrations.torchtitan.experts import experts_class
from moe_fn.integrations.torchtitan.layouts import config_of_experts, layout_of_class


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """Names of the modules that replace_grouped_experts replaced, and of those it kept with the reason."""

    experts: tuple[str, ...]
    dispatchers: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]  # (name, reason)


def replace_grouped_experts(model: nn.Module, *, compute_dtype: torch.dtype | None = None) -> Replaced:
    """Replaces the routed experts and local dispatchers of a torchtitan model in place. Returns what was replaced, and
    what was kept with the reason.

    Only the class of a module changes: parameters, buffers, their names, state_dict, optimizers that hold them, hooks,
    initialization and sharding stay the same. Call it before `parallelize` and before torch.compile, because both wrap
    the current forward. compute_dtype is that of experts_class (torchtitan computes in torch.bfloat16).

    Raises ValueError if no experts could be replaced, with the reasons.
    """
    swapped: list[str] = []
    dispatchers: list[str] = []
    kept: list[tuple[str, str]] = []
    for name, module in list(model.named_modules()):
        layout, why = layout_of_class(type(module)), _why_not(module)
        if layout is not None and why is None:
            config, base = config_of_experts(layout, module), cast(Any, type(module))
            module.__class__ = experts_class(base, compute_dtype)
            module.moe_fn_config = config  # type: ignore[assignment]
            swapped.append(name)
        elif why is not None:
            kept.append((name, why))
        dispatcher: Any = getattr(module, "token_dispatcher", None)
        kind, place = cast(Any, type(dispatcher)), f"{name}.token_dispatcher".lstrip(".")
        if kind.__name__ == "LocalTokenDispatcher":
            dispatcher.__class__ = dispatcher_class(kind)
            dispatcher.moe_fn_config = config_of_dispatcher(dispatcher)
            dispatchers.append(place)
        elif dispatcher is not None:
            kept.append((place, f"{kind.__name__} is not LocalTokenDispatcher"))
    if not swapped:
        raise ValueError(
            f"replace_grouped_experts: a {type(model).__name__} has no experts that can be replaced: found "
            f"{kept or 'none'}; expected a class of LAYOUTS"
        )
    return Replaced(experts=tuple(swapped), dispatchers=tuple(dispatchers), kept=tuple(kept))


def _why_not(module: nn.Module) -> str | None:
    """The reason why experts cannot be replaced; None if they can, and for modules that are not experts."""
    kind = type(module).__name__
    if kind.startswith("MoeFn"):
        return f"{kind} runs on moe_fn already"
    if layout_of_class(type(module)) is None:
        return f"{kind} is not a known class" if kind.endswith("GroupedExperts") else None
    if getattr(module, "_parallelized", False) or "forward" in vars(module):
        return f"{kind} has a wrapped forward; expected a model before parallelize"
    return None
