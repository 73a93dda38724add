"""All options, from the types of the configs' fields, and the options of one config, to find what tests leave out."""

import dataclasses
import itertools
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moe_fn.config import MoEConfig, as_activation

# (class.field, value); for a nested config its class; for a number OTHER, if it is not the default
Option = tuple[str, Any]
OTHER = "another number"


def there_are(cls: Any = MoEConfig) -> set[Option]:
    """Returns every value that the fields of a config class and of its nested configs may have, from their types."""
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
    """Returns the members of a union, or the type itself."""
    if get_origin(hint) not in (Union, types.UnionType):
        return (hint,)
    return tuple(itertools.chain.from_iterable(map(kinds_of, get_args(hint))))


def options_of(config: Any) -> Iterator[Option]:
    """Yields the options of a config and of its nested configs; for the name of an activation also its parameters."""
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
