"""Whether reading a module's parameters is equal to calling it: decided here, for every module below a block and for
activations.

A block that moe_fn computes reads the parameters of the modules below it, and calls none of them. That is the same only
as long as a module is what it was known as: of its class, with the forward of that class, without hooks, with plain
tensors for parameters. Adapters (PEFT), weight norm, pruning, offloading (accelerate), sharding (FSDP2, ZeRO-3),
quantized layers (bitsandbytes, torchao), and somebody's own subclass all break one of these. What then happens is the
caller's: the module is called, or refused by its name. Parametrizations (torch.nn.utils.parametrize) break none:
reading computes them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from moe_fn.torch_compat import is_fake

# Where forwards are written that our tables know.
_KNOWN = ("torch.nn.modules.", "transformers.models.", "transformers.activations")


@dataclass(frozen=True)
class Kind:
    """A module as it is known: its class, None for one that is not, and what is below it."""

    cls: type | None
    children: tuple[tuple[str, "Kind"], ...] = ()


def kind_of(module: nn.Module, beside: type, leave: Iterable[str] = (), alone: Iterable[str] = ()) -> Kind:
    """The module's kind, seen through wrappers that hold it as a base_layer.

    Of the modules directly below it those in `leave` are left out, and those in `alone` count without what is below
    them. beside: a class that is known; what its file defines is known too.
    """
    module = without_wrappers(module)
    cls = type_before_parametrizations(module)
    below = [
        (name, child)
        for name, child in module._modules.items()
        if child is not None and name not in (*leave, "parametrizations")
    ]
    kinds = {name: kind_of(child, beside) for name, child in below}
    children = tuple((name, Kind(kind.cls) if name in alone else kind) for name, kind in kinds.items())
    return Kind(cls if _is_known(cls, beside) else None, children)


def without_wrappers(module: Any) -> Any:
    """What PEFT's layers hold: they keep what they adapt as base_layer."""
    while isinstance(module, nn.Module) and isinstance(module._modules.get("base_layer"), nn.Module):
        module = module._modules["base_layer"]
    return module


def overridden(cls: type, known: type) -> list[str]:
    """Methods that a subclass of a known class has of its own, in place of those that make up that class."""
    before = cls.__mro__.index(known)
    own = {name for c in cls.__mro__[:before] for name in vars(c) if not name.startswith("__") or name == "__call__"}
    made_of = [c for c in cls.__mro__[before:] if c not in (nn.Module, object)]
    named = {"forward", "__call__"} | {name for c in made_of for name, value in vars(c).items() if callable(value)}
    return sorted(name for name in own & named if not same_method(getattr(cls, name), getattr(known, name)))


def same_method(method: Any, known: Any) -> bool:
    """Whether it is the known method: transformers wraps the forward of each class that derives from one of
    its layers.
    """
    if method is known:
        return True
    return getattr(method, "__wrapped__", None) is known and method.__globals__["__name__"].startswith("transformers.")


def _is_known(cls: type, beside: type) -> bool:
    files = (
        c
        for c in cls.__mro__
        if c is not nn.Module and (c.__module__.startswith(_KNOWN) or c.__module__ == beside.__module__)
    )
    known = next(files, None)
    return known is not None and not overridden(cls, known)


def why_called(
    module: nn.Module, kind: Kind, ours: tuple[Any, ...] = (), recorded: str = "", above: str = "", idle: bool = False
) -> str | None:
    """The first module below this one that must be called, by name, and why; None where reading the parameters of all
    is the same.

    This module itself is not looked at. ours: functions of ours that may stand in for a forward, for they read in turn.
    recorded: the name of the one module that is called, and so may have the hooks by which transformers records
    outputs; without it all may have them, for the caller calls none. idle: nothing runs now.
    """
    for name, child_kind in kind.children:
        child, path = module._modules.get(name), above + name
        if child is None:
            return f"{path} is gone"
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
    """Why this one module must be called; None where reading its parameters is the same."""
    if cls is None or (
        type(module) is not cls and not (is_parametrized(module) and type_before_parametrizations(module) is cls)
    ):
        return f"is a {_full_name(type(module))}" + ("" if cls is None else f", where a {_full_name(cls)} is known")
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
        return "has a forward of its own"
    if isinstance(module, nn.Dropout) and module.training and module.p > 0:
        return f"drops in training (p={module.p})"
    return None


def why_not_plain(module: nn.Module, idle: bool = False) -> str | None:
    """Which parameter or buffer is no plain tensor; None where all are.

    idle: FSDP2's shards may be whole when the module runs.
    """
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and not is_plain(tensor) and not (idle and type(tensor).__name__ == "DTensor"):
                return f"has a {type(tensor).__name__} for {name}"
    return None


def calls_known_modules_only(module: nn.Module) -> bool:
    """Whether a module that our tables know may be computed from its numbers: it and those below it are as
    they come.
    """
    parts = module.modules()
    return all(
        type(part).__module__.startswith(_KNOWN) and why_called_itself(part, type(part)) is None for part in parts
    )


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a tensor of torch's own: no shard, no codes, no class that computes in its own way.

    Those of tracing are.
    """
    return type(tensor) in (nn.Parameter, Tensor, nn.Buffer) or is_fake(tensor)


def _records(hook: Any) -> bool:
    return getattr(hook, "__module__", "").startswith("transformers.utils.")
