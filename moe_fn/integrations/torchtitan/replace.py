"""Swapping torchtitan's experts and dispatchers in a built model."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from moe_fn.integrations.torchtitan.dispatcher import config_of_dispatcher, dispatcher_class
from moe_fn.integrations.torchtitan.experts import experts_class
from moe_fn.integrations.torchtitan.layouts import config_of_experts, layout_of_class


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """What replace_grouped_experts did: names of modules, and why others stayed."""

    experts: tuple[str, ...]
    dispatchers: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]  # (name, why)


def replace_grouped_experts(model: nn.Module, *, compute_dtype: torch.dtype | None = None) -> Replaced:
    """Have moe_fn compute the routed experts of a torchtitan model, in place; returns what was swapped and what stayed,
    and why.

    Modules keep their identity and only change their class: parameters, buffers, their names, state_dict, optimizers
    that hold them, hooks, initialisation and sharding stay what they were. Call it before `parallelize` and before
    torch.compile, for both wrap the forward that is there. compute_dtype as in experts_class (torch.bfloat16: what
    torchtitan computes in).

    Raises ValueError where nothing could be swapped: what was found, and why it stayed.
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
            f"replace_grouped_experts: no experts to swap in a {type(model).__name__}; found {kept or 'none'}"
        )
    return Replaced(experts=tuple(swapped), dispatchers=tuple(dispatchers), kept=tuple(kept))


def _why_not(module: nn.Module) -> str | None:
    """Why experts cannot be swapped; None for those that can, and for what is no experts at all."""
    kind = type(module).__name__
    if kind.startswith("MoeFn"):
        return f"{kind} runs on moe_fn already"
    if layout_of_class(type(module)) is None:
        return f"{kind} is none of the classes that are known" if kind.endswith("GroupedExperts") else None
    if getattr(module, "_parallelized", False) or "forward" in vars(module):
        return f"{kind} has a wrapped forward: expected to be called before parallelize"
    return None
