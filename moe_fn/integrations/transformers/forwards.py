"""A forward of ours on a module, beside the one of its class: put there, recognised, and taken away again."""

from collections.abc import Callable
from typing import Any

from torch import nn


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of its class, bound to it."""
    return type(module).forward.__get__(module)  # type: ignore[no-any-return]


def has_own_forward(module: nn.Module, ours: tuple[Any, ...]) -> bool:
    """Whether somebody else put a forward on the module, which setting ours would take away.

    Where accelerate did, what its forward calls is looked at, for ours is set there.
    """
    forward = module.__dict__.get(_slot(module))
    if forward is None or getattr(forward, "func", None) in ours:
        return False
    return getattr(forward, "__func__", None) is not type(module).forward


def set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """The module calls it from now on; below a hook of accelerate, if there is one."""
    setattr(module, _slot(module), forward)


def unset_forward(module: nn.Module, ours: tuple[Any, ...]) -> bool:
    """The module calls the forward of its class again; whether it called one of ours."""
    slots = [slot for slot in ("forward", "_old_forward") if getattr(module.__dict__.get(slot), "func", None) in ours]
    for slot in slots:
        if slot == "forward":
            delattr(module, slot)
        else:
            setattr(module, slot, own_forward(module))
    return bool(slots)


def _slot(module: nn.Module) -> str:
    """accelerate.hooks.add_hook_to_module sets a forward that calls `_old_forward` between the hook's two halves."""
    return "_old_forward" if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ else "forward"
