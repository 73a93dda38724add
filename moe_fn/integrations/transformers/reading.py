"""Decides whether reading a module's parameters is equivalent to calling it, for modules of a block and activations.

A block that moe_fn computes reads the parameters of its modules and does not call them. That is equivalent only while a
module has its known class with the forward of that class, no hooks, and plain tensors as parameters. Adapters (PEFT),
weight norm, pruning, offloading (accelerate), sharding (FSDP2, ZeRO-3), quantized layers (bitsandbytes, torchao) and
user subclasses violate one of these conditions. The caller then calls the module or refuses it by name.
Parametrizations (torch.nn.utils.parametrize) violate none: reading computes them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from moe_fn.torch_compat import is_fake

# Modules (files) with the forwards of the known classes.
_KNOWN = ("torch.nn.modules.", "transformers.models.", "transformers.activations")


@dataclass(frozen=True)
class Kind:
    """A module's known class (None if it is unknown) and the kinds of its children."""

    cls: type | None
    children: tuple[tuple[str, "Kind"], ...] = ()


def kind_of(module: nn.Module, block: type, leave: Iterable[str] = (), alone: Iterable[str] = ()) -> Kind:
    """The module's kind; wrappers with a base_layer are skipped.

    Children in `leave` are left out, and those in `alone` are included without their own children. block: a known
    class; classes of the same file are known too.
    """
    module = without_wrappers(module)
    cls = type_before_parametrizations(module)
    below = [
        (name, child)
        for name, child in module._modules.items()
        if child is not None and name not in (*leave, "parametrizations")
    ]
    kinds = {name: kind_of(child, block) for name, child in below}
    children = tuple((name, Kind(kind.cls) if name in alone else kind) for name, kind in kinds.items())
    return Kind(cls if _is_known(cls, block) else None, children)


def without_wrappers(module: Any) -> Any:
    """The module inside PEFT's layers, which keep the adapted module as base_layer."""
    while isinstance(module, nn.Module) and isinstance(module._modules.get("base_layer"), nn.Module):
        module = module._modules["base_layer"]
    return module


def overridden(cls: type, known: type) -> list[str]:
    """Names of the known class's methods that a subclass overrides."""
    before = cls.__mro__.index(known)
    own = {name for c in cls.__mro__[:before] for name in vars(c) if not name.startswith("__") or name == "__call__"}
    made_of = [c for c in cls.__mro__[before:] if c not in (nn.Module, object)]
    named = {"forward", "__call__"} | {name for c in made_of for name, value in vars(c).items() if callable(value)}
    return sorted(name for name in own & named if not same_method(getattr(cls, name), getattr(known, name)))


def same_method(method: Any, known: Any) -> bool:
    """Whether a method is the known one, or transformers' wrapper of it: it wraps the forward of subclasses of its
    layers.
    """
    if method is known:
        return True
    return getattr(method, "__wrapped__", None) is known and method.__globals__["__name__"].startswith("transformers.")


def _is_known(cls: type, block: type) -> bool:
    files = (
        c
        for c in cls.__mro__
        if c is not nn.Module and (c.__module__.startswith(_KNOWN) or c.__module__ == block.__module__)
    )
    known = next(files, None)
    return known is not None and not overridden(cls, known)


def why_called(
    module: nn.Module, kind: Kind, ours: tuple[Any, ...] = (), recorded: str = "", above: str = "", idle: bool = False
) -> str | None:
    """The name of the first module below this one that must be called, and the reason; None if reading all parameters
    is equivalent.

    This module itself is not checked. ours: functions of moe_fn that may replace a forward, because they read too.
    recorded: the name of the module that is called, and may have hooks with which transformers records outputs; without
    a name all modules may have them, because the caller calls none. idle: the model is not running.
    """
    for name, child_kind in kind.children:
        child, path = module._modules.get(name), above + name
        if child is None:
            return f"{path} was removed"
        why = why_called_itself(child, child_kind.cls, ours, not recorded or path == recorded) or why_not_plain(
            child, idle
        )
        if why is not None:
            return f"{path} {why}"
        why = why_called(child, child_kind, ours, recorded, f"{path}.", idle)
        if why is not None:
            return why
    return None


def why_called_itself(
    module: nn.Module, cls: type | None, ours: tuple[Any, ...] = (), recorded: bool = False
) -> str | None:
    """The reason why this module must be called; None if reading its parameters is equivalent."""
    if cls is None or (
        type(module) is not cls and not (is_parametrized(module) and type_before_parametrizations(module) is cls)
    ):
        return f"is a {_full_name(type(module))}" + ("" if cls is None else f", not a {_full_name(cls)}")
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    if module._forward_hooks and not (recorded and all(_records(hook) for hook in module._forward_hooks.values())):
        return "has hooks"
    forward = module.__dict__.get("forward")
    if (
        forward is not None
        and getattr(forward, "func", None) not in ours
        and getattr(forward, "__func__", None) is not type(module).forward
    ):
        return "has its own forward"
    if isinstance(module, nn.Dropout) and module.training and module.p > 0:
        return f"is active in training (p={module.p})"
    return None


def why_not_plain(module: nn.Module, idle: bool = False) -> str | None:
    """The first parameter or buffer that is not a plain tensor; None if all are.

    idle: the model is not running, and FSDP2's shards (DTensors) are accepted because they may be gathered in forward.
    """
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and not is_plain(tensor) and not (idle and type(tensor).__name__ == "DTensor"):
                return f"has a {type(tensor).__name__} for {name}"
    return None


def calls_known_modules_only(module: nn.Module) -> bool:
    """Whether a module and all modules below it are unmodified classes of torch or transformers, so that reading them
    is equivalent to calling them.
    """
    parts = module.modules()
    return all(
        type(part).__module__.startswith(_KNOWN) and why_called_itself(part, type(part)) is None for part in parts
    )


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a plain tensor: not sharded, quantized or another subclass. Fake tensors of tracing are plain."""
    return type(tensor) in (nn.Parameter, Tensor, nn.Buffer) or is_fake(tensor)


def _records(hook: Any) -> bool:
    return getattr(hook, "__module__", "").startswith("transformers.utils.")
