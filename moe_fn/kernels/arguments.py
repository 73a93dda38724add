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
from moe_fn.records import QuantWeights
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
        kinds = [kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)]
        found |= _fields(kinds[0]) if kinds else {name: _argument(hint)}  # type: ignore[arg-type]
    return found


ARGUMENTS = _fields(RoutedExpertsArguments)
ACTIVATION = tuple(_fields(ActivationConfig))
QUANT_WEIGHTS = tuple(_fields(QuantWeights))
SCHEMA = ", ".join(f"{argument.schema} {name}" for name, argument in ARGUMENTS.items())
TENSORS = tuple(name for name, argument in ARGUMENTS.items() if argument.type == "Tensor")
DIFFERENTIABLE = tuple(name for name, argument in ARGUMENTS.items() if argument.differentiable)

_QUANT_WEIGHTS = RoutedExpertsArguments._fields.index("quant_weights")
_AFTER = _QUANT_WEIGHTS + len(QUANT_WEIGHTS)  # the first argument behind them


@constant_while_tracing
def _floats() -> tuple[None, ...]:
    return (None,) * len(QUANT_WEIGHTS)



def flat(arguments: RoutedExpertsArguments) -> tuple[Any, ...]:
    """The arguments as the op takes them, in the order of its schema."""
    codes = arguments.quant_weights
    return (
        *arguments[:_QUANT_WEIGHTS],
        *(_floats() if codes is None else [getattr(codes, name) for name in QUANT_WEIGHTS]),
        *arguments[_QUANT_WEIGHTS + 1 : -1],
        *arguments.activation.values,
    )


def arguments_of(args: Sequence[Any]) -> RoutedExpertsArguments:
    """The record of arguments that `flat` made."""
    leaves, activation = args[_QUANT_WEIGHTS:_AFTER], len(args) - len(ACTIVATION)
    codes = None
    if any(leaf is not None for leaf in leaves):
        codes = QuantWeights(**dict(zip(QUANT_WEIGHTS, leaves, strict=True)))
    scalars = args[_AFTER:activation]
    return RoutedExpertsArguments._make([*args[:_QUANT_WEIGHTS], codes, *scalars, _activation(*args[activation:])])


@functools.lru_cache
def _activation(*parameters: Any) -> ActivationConfig:
    """Cached, for every launch asks for it."""
    return ActivationConfig(**dict(zip(ACTIVATION, parameters, strict=True)))
