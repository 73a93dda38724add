"""Of what type arguments are, and tensors of what dtype: said in words before anything reads them. Shapes: `moe_fn.checking`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from moe_fn.config import MoEConfig
from moe_fn.records import NESTED_WEIGHTS, WEIGHT_PATHS, MoEWeights, leaves_of_weights


def check_kind(where: str, name: str, value: Any, kind: type) -> None:
    """ValueError where the value is not of the type."""
    if type(value) is kind:  # nearly every value of every call
        return
    if is_shard(value):
        raise ValueError(
            f"{where}: {name} is a DTensor, a shard; expected a plain Tensor. With FSDP2 wrap (fully_shard) the module whose forward makes "
            "this call and none below it; elsewhere hand over its full_tensor() or to_local()"
        )
    if isinstance(value, kind):
        return
    expected = f"{'a ' if kind is Tensor else ''}{kind.__name__}"
    if isinstance(value, Proxy):
        expected += f", or torch.fx.wrap({where!r}) beside its import: torch.fx.symbolic_trace then takes the call as one node"
    raise ValueError(f"{where}: {name} is a {type(value).__name__}; expected {expected}")


def check_untraced(where: str, size: Any) -> None:
    """ValueError below torch.jit.trace, whose sizes are tensors: what is computed of them here would stay as it was for the example."""
    if isinstance(size, Tensor):
        raise ValueError(
            f"{where}: torch.jit.trace takes the sizes of its example for all; expected torch.export.export, torch.compile, or "
            "moe_forward with MoEConfig(opaque=True), which is one op"
        )


def is_shard(value: Any) -> bool:
    """Whether it is a DTensor: looked up by name, for importing the class takes a second."""
    return type(value) is not Tensor and type(value) is not nn.Parameter and type(value).__name__ == "DTensor"


def check_config(where: str, config: Any) -> None:
    """ValueError for anything but a MoEConfig."""
    check_kind(where, "config", config, MoEConfig)


INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_KINDS: dict[str, tuple[str, Callable[[torch.dtype], bool]]] = {
    "float": ("a floating-point dtype", lambda dtype: dtype.is_floating_point),
    "bool": ("bool", lambda dtype: dtype == torch.bool),
    "integer": ("an integer dtype", lambda dtype: dtype in INTEGERS),
}


def check_dtype(where: str, name: str, value: Tensor, kind: str) -> None:
    """ValueError for another kind of dtype: "float", "bool" or "integer"."""
    check_kind(where, name, value, Tensor)
    wanted, fits = _KINDS[kind]
    if not fits(value.dtype):
        raise ValueError(f"{where}: {name} is {value.dtype}; expected {wanted}")


def checked_integers(where: str, name: str, value: Tensor) -> Tensor:
    """The integers as int64, which every function of this package computes with; ValueError for another kind of dtype.

    Here, where they come in, and nowhere else: -1 and num_experts, the words for no expert, may not fit into the dtype that they came in,
    where 255 is expert 255 or -1, and much of torch knows nothing of uint16.
    """
    check_dtype(where, name, value, "integer")
    return value if value.dtype == torch.int64 else value.to(torch.int64)


def check_layer(where: str, config: Any, weights: Any) -> None:
    """ValueError for anything but a MoEConfig and MoEWeights that hold tensors."""
    check_config(where, config)
    check_kind(where, "weights", weights, MoEWeights)
    for name, kind in NESTED_WEIGHTS.items():
        if getattr(weights, name) is not None:
            check_kind(where, f"weights.{name}", getattr(weights, name), kind)
    for name in ("gate_up", "down"):
        check_kind(where, f"weights.{name}", getattr(weights, name), Tensor)
    for path, leaf in zip(WEIGHT_PATHS, leaves_of_weights(weights), strict=True):
        if leaf is not None and type(leaf) is not Tensor and type(leaf) is not nn.Parameter:
            check_kind(where, f"weights.{'.'.join(path)}", leaf, Tensor)
