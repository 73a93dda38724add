"""The arguments of the fused op `routed_experts` as one record.

The op's schema, which arguments are tensors and which have gradients, the arguments of the C++ function
(`moe_fn.kernels.native.generated`) and of the Triton kernels derive from the fields of the record.
"""

import dataclasses
import functools
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from moe_fn.config import ActivationConfig
from moe_fn.records import LoRAWeights, QuantWeights
from moe_fn.torch_compat import constant_while_tracing

Differentiable = Annotated[Tensor, "differentiable"]


class RoutedExpertsArguments(NamedTuple):
    """One call of the op. Records inside it are arguments too: each of their fields is one, in their order."""

    x: Differentiable  # [T, Hx]
    expert_ids: Tensor  # [T, top_k] integers
    expert_weights: Differentiable  # [T, top_k] float
    gate_up: Differentiable  # plain, prepared, or codes
    down: Differentiable
    gate_up_bias: Differentiable | None  # in the dtype of x, or in the one that it accumulates in
    down_bias: Differentiable | None
    quant_weights: QuantWeights | None  # None: weights are floats
    adapter_ids: Tensor | None  # [T] integers; None: adapter 0, if there are any
    lora: Annotated[LoRAWeights, "differentiable"] | None
    intermediate_size: int
    transposed: bool  # weights are laid out [E, out, in]
    interleaved: bool  # columns of gate_up
    quant: str  # QuantConfig.json, or ""
    invariant: bool  # no bit of a token's result depends on the other tokens
    activation: ActivationConfig


@dataclasses.dataclass(frozen=True)
class Argument:
    """The type of one argument of the op: torch's name for it ("Tensor", "int", "bool", "float", "str")."""

    type: str
    optional: bool = False
    differentiable: bool = False

    @property
    def schema(self) -> str:
        """As a schema of torch.library has it."""
        return f"{self.type}?" if self.optional else self.type


def _argument(hint: Any) -> Argument:
    """The argument of a type hint.

    >>> _argument(float | None), _argument(Differentiable).differentiable
    (Argument(type='float', optional=True, differentiable=False), True)
    """
    if get_origin(hint) in (Union, UnionType):
        (inner,) = (part for part in get_args(hint) if part is not NoneType)
        return dataclasses.replace(_argument(inner), optional=True)
    if get_origin(hint) is Annotated:
        return dataclasses.replace(_argument(get_args(hint)[0]), differentiable=True)
    return Argument("str" if get_origin(hint) is Literal else hint.__name__)


def _fields(record: type) -> dict[str, Argument]:
    """The fields of a record; those of a record inside it in its place."""
    found: dict[str, Argument] = {}
    for name, hint in get_type_hints(record, include_extras=True).items():
        inside, differentiable = _record(hint)
        if inside is None:
            found[name] = _argument(hint)
        else:
            found |= {n: dataclasses.replace(a, differentiable=differentiable) for n, a in _fields(inside).items()}
    return found


def _record(hint: Any) -> tuple[type | None, bool]:
    """The record of a type hint, or None, and whether its tensors have gradients."""
    for kind in (hint, *get_args(hint)):
        annotated = get_origin(kind) is Annotated
        inside = get_args(kind)[0] if annotated else kind
        if dataclasses.is_dataclass(inside):
            return inside, annotated  # type: ignore[return-value]
    return None, False


ARGUMENTS = _fields(RoutedExpertsArguments)
ACTIVATION = tuple(_fields(ActivationConfig))
SCHEMA = ", ".join(f"{argument.schema} {name}" for name, argument in ARGUMENTS.items())
TENSORS = tuple(name for name, argument in ARGUMENTS.items() if argument.type == "Tensor")
DIFFERENTIABLE = tuple(name for name, argument in ARGUMENTS.items() if argument.differentiable)

# Of each field of RoutedExpertsArguments: the record in its place and the record's fields, or None for an argument.
_RECORDS: tuple[tuple[type, tuple[str, ...]] | None, ...] = tuple(
    None if (record := _record(hint)[0]) is None else (record, tuple(_fields(record)))
    for hint in get_type_hints(RoutedExpertsArguments, include_extras=True).values()
)


@constant_while_tracing
def _fields_of_records() -> tuple[tuple[str, ...] | None, ...]:
    return tuple(None if record is None else record[1] for record in _RECORDS)


def flat(arguments: RoutedExpertsArguments) -> tuple[Any, ...]:
    """The arguments as the op takes them, in the order of its schema."""
    leaves: list[Any] = []
    for value, fields in zip(arguments, _fields_of_records(), strict=True):
        if fields is None:
            leaves.append(value)
        elif value is None:
            leaves += [None] * len(fields)
        else:
            leaves += [getattr(value, name) for name in fields]
    return tuple(leaves)


def arguments_of(args: Sequence[Any]) -> RoutedExpertsArguments:
    """The record of arguments that `flat` made."""
    leaves, values = iter(args), list[Any]()
    for record in _RECORDS:
        if record is None:
            values.append(next(leaves))
            continue
        kind, parts = record[0], tuple(next(leaves) for _ in record[1])
        if kind is ActivationConfig:
            values.append(_activation(*parts))
        else:
            given = any(part is not None for part in parts)
            values.append(kind(**dict(zip(record[1], parts, strict=True))) if given else None)
    return RoutedExpertsArguments._make(values)


@functools.lru_cache
def _activation(*parameters: Any) -> ActivationConfig:
    """Cached, for every launch asks for it."""
    return ActivationConfig(**dict(zip(ACTIVATION, parameters, strict=True)))
