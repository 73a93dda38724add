"""Ways to change what a module computes without changing its parameters: hooks, adapters, wrappers, quantized tensors.

Each changes a result by a factor of 1.5.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def louder(out: Any) -> Any:
    """Multiplies every floating-point tensor of a module's input or output by 1.5."""
    if isinstance(out, tuple):
        return tuple(map(louder, out))
    return out * 1.5 if isinstance(out, Tensor) and out.is_floating_point() else out


def names_of(module: nn.Module) -> list[str]:
    """Returns the names of the module's own parameters."""
    return [name for name, tensor in module._parameters.items() if tensor is not None]


class Louder(nn.Module):
    """A parametrization that multiplies the stored parameter by 1.5."""

    def forward(self, kept: Tensor) -> Tensor:
        return louder(kept)


class Adapter(nn.Module):
    """A module like an adapter's layer, around a base_layer, whose weight is also its own."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    def forward(self, *args: Any, **by_name: Any) -> Any:
        return louder(self.base_layer(*args, **by_name))


class ParameterAdapter(Adapter):
    """A module like PEFT's ParamWrapper, which changes the parameters of its base_layer only during its call."""

    def forward(self, *args: Any, **by_name: Any) -> Any:
        names = names_of(self.base_layer)
        for name in names:
            parametrize.register_parametrization(self.base_layer, name, Louder())
        try:
            return self.base_layer(*args, **by_name)
        finally:
            for name in names:
                parametrize.remove_parametrizations(self.base_layer, name, leave_parametrized=False)


class Wrapper(nn.Module):
    """A module like PEFT's ModulesToSaveWrapper and torch.compile's OptimizedModule: attributes that it lacks
    are those of the module inside.
    """

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def __getattr__(self, name: str) -> Any:
        held = self.__dict__["_modules"].get("held") if "_modules" in self.__dict__ else None
        return getattr(held, name) if held is not None and name != "held" else super().__getattr__(name)

    def forward(self, *args: Any, **by_name: Any) -> Any:
        return louder(self.held(*args, **by_name))


class Coded(Tensor):
    """A tensor subclass like a quantized tensor: its values are 1.5 times those that it stores."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def decoded(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(map(decoded, value))
            return value.as_subclass(Tensor) * 1.5 if isinstance(value, Coded) else value

        with torch._C.DisableTorchFunctionSubclass():
            if function in _OF_ITSELF:
                return function(*args, **(kwargs or {}))
            return function(*decoded(args), **{name: decoded(value) for name, value in (kwargs or {}).items()})


_OF_ITSELF = {
    Tensor.requires_grad_,
    Tensor.dtype.__get__,
    Tensor.device.__get__,
    Tensor.shape.__get__,
    Tensor.as_subclass,
    Tensor.detach,
}
_OF_ITSELF |= {Tensor.requires_grad.__get__, Tensor.ndim.__get__, Tensor.is_floating_point}


def _forward_hook(parent: nn.Module, name: str, module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, out: louder(out))


def _pre_hook(parent: nn.Module, name: str, module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: louder(args))


def _backward_hook(parent: nn.Module, name: str, module: nn.Module) -> None:
    module.register_full_backward_pre_hook(lambda module, gradients: louder(gradients))


def _parametrization(parent: nn.Module, name: str, module: nn.Module) -> None:
    for parameter in names_of(module):
        parametrize.register_parametrization(module, parameter, Louder())


def _recomputed(parent: nn.Module, name: str, module: nn.Module) -> None:
    """A hook computes the parameter from a stored one in every call, as torch.nn.utils.weight_norm and prune do."""
    kept = names_of(module)
    for parameter in kept:
        tensor = module._parameters.pop(parameter)
        module.register_parameter(f"{parameter}_kept", tensor)
        setattr(module, parameter, tensor.detach())  # the old values until the first call

    def recompute(module: nn.Module, args: Any) -> None:
        for parameter in kept:
            setattr(module, parameter, louder(getattr(module, f"{parameter}_kept")))

    module.register_forward_pre_hook(recompute)


def _own_forward(parent: nn.Module, name: str, module: nn.Module) -> None:
    module.forward = types.MethodType(
        lambda self, *args, **by_name: louder(type(self).forward(self, *args, **by_name)), module
    )


def _own_class(parent: nn.Module, name: str, module: nn.Module) -> None:
    cls: Any = type(module)

    def forward(self: Any, *args: Any, **by_name: Any) -> Any:
        return louder(cls.forward(self, *args, **by_name))

    module.__class__ = type(f"My{cls.__name__}", (cls,), {"forward": forward})


def _adapter(parent: nn.Module, name: str, module: nn.Module) -> None:
    setattr(parent, name, Adapter(module))


def _parameter_adapter(parent: nn.Module, name: str, module: nn.Module) -> None:
    setattr(parent, name, ParameterAdapter(module))


def _wrapper(parent: nn.Module, name: str, module: nn.Module) -> None:
    setattr(parent, name, Wrapper(module))


def _coded(parent: nn.Module, name: str, module: nn.Module) -> None:
    for parameter in names_of(module):
        coded = module._parameters[parameter].detach().as_subclass(Coded)
        coded._is_param = True
        module._parameters[parameter] = coded


# functions of (the module's parent, its name there, the module), which change what the module computes
WAYS: dict[str, Callable[[nn.Module, str, nn.Module], None]] = {
    "forward hook": _forward_hook,
    "forward pre-hook": _pre_hook,
    "backward pre-hook": _backward_hook,
    "parametrization": _parametrization,
    "recomputed before every call": _recomputed,
    "own forward": _own_forward,
    "own class": _own_class,
    "adapter": _adapter,
    "adapter of parameters": _parameter_adapter,
    "wrapper": _wrapper,
    "coded parameters": _coded,
}
OF_PARAMETERS = ("parametrization", "recomputed before every call", "adapter of parameters", "coded parameters")


def hang(block: nn.Module, path: str, way: str) -> None:
    """Changes the module at a path of the block in one of the WAYS."""
    above, _, name = path.rpartition(".")
    WAYS[way](block.get_submodule(above), name, block.get_submodule(path))
