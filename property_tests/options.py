"""Which options there are, by the types of the configs' fields, and which of them a config has: so that tests can say
what is left out.
"""

import dataclasses
import itertools
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moe_fn.config import MoEConfig, as_activation

# a field, with its class, and its value; the class of a config; of numbers only whether it is the default
Option = tuple[str, Any]
OTHER = "another number"


def there_are(cls: Any = MoEConfig) -> set[Option]:
    """Every value that the fields of a config may have, and those of the configs that it nests: a new one is here by
    itself.
    """
    found: set[Option] = set()
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        where = f"{cls.__name__}.{field.name}"
        for kind in kinds_of(hints[field.name]):
            if dataclasses.is_dataclass(kind):
                found |= {(where, kind.__name__), *there_are(kind)}  # type: ignore[union-attr]
            elif get_origin(kind) is Literal:
                found |= {(where, value) for value in get_args(kind)}
            elif kind is bool:
                found |= {(where, True), (where, False)}
            else:
                found.add((where, None if kind is types.NoneType else OTHER))
    return found


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The parts of a union, or the one type."""
    if get_origin(hint) not in (Union, types.UnionType):
        return (hint,)
    return tuple(itertools.chain.from_iterable(map(kinds_of, get_args(hint))))


def options_of(config: Any) -> Iterator[Option]:
    """Those that a config has, and the configs that it nests; the name of an activation stands for its
    parameters too.
    """
    for field in dataclasses.fields(config):
        where, value = f"{type(config).__name__}.{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield where, type(value).__name__
            yield from options_of(value)
        elif value is None or isinstance(value, bool | str):
            yield where, value
        elif value != field.default:
            yield where, OTHER
        if field.name == "activation" and isinstance(value, str):
            yield from options_of(as_activation(value))  # type: ignore[arg-type]
