"""Argument checks of sizes, types, dtypes and tensor shapes: ValueError says where, what came and what was expected."""

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from moe_fn.torch_compat import check_same_size, constant_while_tracing

LARGEST = 2**63 - 1  # torch holds sizes, counts and ranks in int64


def check_int(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    if type(value) is not int or not minimum <= value <= (LARGEST if maximum is None else maximum):
        wanted = (
            f"in {minimum}..{maximum}"
            if maximum is not None
            else f">= {minimum}, below 2^63"
            if _is_huge(value)
            else f">= {minimum}"
        )
        raise ValueError(f"{name} is {value!r:.200}; expected an int {wanted}")


def check_bool(name: str, value: object) -> None:
    if type(value) is not bool:
        raise ValueError(f"{name} is {value!r:.200}; expected True or False")


def check_float(name: str, value: object, *, minimum: float = -math.inf, above: float = -math.inf) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and not _is_huge(value)
    if not number or not math.isfinite(value) or value < minimum or value <= above:  # type: ignore[arg-type, operator]
        bound = f" > {above}" if above > -math.inf else f" >= {minimum}" if minimum > -math.inf else ""
        raise ValueError(f"{name} is {value!r:.200}; expected a finite number{bound}")


def _is_huge(value: object) -> bool:
    """Whether the value is an int outside of int64; converting it to a float may raise."""
    return isinstance(value, int) and abs(value) > LARGEST


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r:.200}; expected one of {', '.join(map(repr, choices))}")


def check_kind(where: str, name: str, value: Any, kind: type) -> None:
    """Raises ValueError unless the value has the type."""
    if type(value) is kind:  # fast path: nearly every argument of every call
        return
    if is_shard(value):
        raise ValueError(
            f"{where}: {name} is a DTensor, a shard; expected a plain Tensor. With FSDP2 wrap (fully_shard) the module "
            "whose forward makes this call and no module below it; otherwise pass full_tensor() or to_local()"
        )
    if isinstance(value, kind):
        return
    expected = f"{'a ' if kind is Tensor else ''}{kind.__name__}"
    if isinstance(value, Proxy):
        expected += (
            f"; for torch.fx.symbolic_trace call torch.fx.wrap({where!r}) in the module that imports it: "
            "the call becomes one node"
        )
    raise ValueError(f"{where}: {name} is a {type(value).__name__}; expected {expected}")


def check_untraced(where: str, size: Any) -> None:
    """Raises ValueError under torch.jit.trace, where sizes are tensors: the trace would fix the example's sizes."""
    if isinstance(size, Tensor):
        raise ValueError(
            f"{where}: torch.jit.trace would fix the sizes of its example; expected torch.export.export, "
            "torch.compile, or moe_forward with MoEConfig(opaque=True), which is one op"
        )


def is_shard(value: Any) -> bool:
    """Whether the value is a DTensor. Compares the class name, because importing the class takes a second."""
    return type(value) is not Tensor and type(value) is not nn.Parameter and type(value).__name__ == "DTensor"


INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


_KINDS: dict[str, tuple[str, Callable[[torch.dtype], bool]]] = {
    "float": ("a floating-point dtype", lambda dtype: dtype.is_floating_point),
    "bool": ("bool", lambda dtype: dtype == torch.bool),
    "integer": ("an integer dtype", lambda dtype: dtype in INTEGERS),
}


def check_dtype(where: str, name: str, value: Tensor, kind: str) -> None:
    """Raises ValueError unless the value is a Tensor with a dtype of this kind: "float", "bool" or "integer"."""
    check_kind(where, name, value, Tensor)
    if not _is_of_kind(value.dtype, kind):
        raise ValueError(f"{where}: {name} is {value.dtype}; expected {_name_of_kind(kind)}")


@constant_while_tracing
def _is_of_kind(dtype: torch.dtype, kind: str) -> bool:
    return _KINDS[kind][1](dtype)


@constant_while_tracing
def _name_of_kind(kind: str) -> str:
    return _KINDS[kind][0]


def checked_integers(where: str, name: str, value: Tensor) -> Tensor:
    """Returns the integers as int64, the only integer dtype that this package computes with.

    Public functions convert at the boundary: -1 and num_experts, which both mark "no expert", may not fit the caller's
    dtype (255 in uint8 is expert 255 or -1), and many torch ops do not support uint16. Raises ValueError for a dtype
    that is not an integer.
    """
    check_dtype(where, name, value, "integer")
    return value if value.dtype == torch.int64 else value.to(torch.int64)


def check_per_token(where: str, name: str, value: Tensor, x: Tensor, last: tuple[str, int] | None, kind: str) -> None:
    """Raises ValueError unless the value has one entry (or one row of `last` entries) for each token of x."""
    check_kind(where, name, value, Tensor)
    leading = x.ndim - 1
    if value.ndim != leading + (last is not None) or (last is not None and value.shape[-1] != last[1]):
        wanted = f"(..., {last[0]}) with {last[0]}={last[1]}" if last else "(...)"
        raise ValueError(
            f"{where}: {name} is {sizes_of(value)}; expected {wanted} and the leading dims of x, {sizes_of(x)}"
        )
    for dim in range(leading):
        if torch.compiler.is_compiling():
            # Dynamo cannot format symbolic sizes, so this message has none.
            message = f"{where}: {name} and x differ in their number of tokens; expected the leading dims of x"
            check_same_size(value.shape[dim], x.shape[dim], message)
        elif value.shape[dim] != x.shape[dim]:
            raise ValueError(f"{where}: {name} is {sizes_of(value)}; expected the leading dims of x, {sizes_of(x)}")
    check_dtype(where, name, value, kind)
    if value.device != x.device:
        raise ValueError(f"{where}: {name} is on {value.device}; expected the device of x, {x.device}")


def checked_ids(where: str, name: str, value: Tensor, x: Tensor, last: tuple[str, int] | None) -> Tensor:
    """Returns per-token integers as int64, after `check_per_token`."""
    check_per_token(where, name, value, x, last, "integer")
    return checked_integers(where, name, value)


def sizes_of(t: Tensor) -> str:
    """Returns the shape of a tensor as text for error messages."""
    return "(" + ", ".join(str(size) for size in t.shape) + ")"
