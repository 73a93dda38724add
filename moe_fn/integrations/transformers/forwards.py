"""Sets, recognizes and removes a forward of moe_fn on a block's modules, which overrides the forward of their class."""

from collections.abc import Callable
from typing import Any

from torch import nn


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the module's class, bound to the module."""
    return type(module).forward.__get__(module)  # type: ignore[no-any-return]


def has_own_forward(module: nn.Module, ours: tuple[Any, ...]) -> bool:
    """Whether the module has a forward that is neither its class's nor in `ours`, and that set_forward would overwrite.

    With accelerate's hook this is the forward that the hook calls, because set_forward sets that one.
    """
    forward = module.__dict__.get(_slot(module))
    if forward is None or getattr(forward, "func", None) in ours:
        return False
    return getattr(forward, "__func__", None) is not type(module).forward


def set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Sets the module's forward, inside accelerate's hook if there is one."""
    setattr(module, _slot(module), forward)


def unset_forward(module: nn.Module, ours: tuple[Any, ...]) -> bool:
    """Restores the forward of the module's class. Returns whether the module had one of `ours`."""
    slots = [slot for slot in ("forward", "_old_forward") if getattr(module.__dict__.get(slot), "func", None) in ours]
    for slot in slots:
        if slot == "forward":
            delattr(module, slot)
        else:
            setattr(module, slot, own_forward(module))
    return bool(slots)


def _slot(module: nn.Module) -> str:
    """The attribute to set: with a hook of accelerate its forward calls `_old_forward` between pre- and
    post-forward.
    """
    return "_old_forward" if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ else "forward"
