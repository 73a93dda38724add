"""Keys of a model's config, or attributes of a live block, that a family's options are read from.

A family's row holds `Key`s among its constants; `resolve` looks them up.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Hashable, Mapping
from typing import Any

Lookup = Callable[[str], Any]  # the value of a name, or MISSING
_LARGEST = sys.float_info.max


class _Missing:
    def __repr__(self) -> str:
        return "missing"


MISSING = _Missing()


class _Null:
    def __repr__(self) -> str:
        return "None"


# null where the model's config class needs a value: no kind of key accepts it, so it is never read as "none" or False
NULL = _Null()


@dataclasses.dataclass(frozen=True)
class Key:
    """An option of a model: the value of the first of `names` that the model has, else `default`.

    names    keys of config.json; with a leading dot, attributes of a live block's modules
    values   translates the value; a value that is not in it is an error. Keys among its results are resolved in turn
    kind     a row of KINDS: the required type
    """

    names: tuple[str, ...]
    default: Any = MISSING
    values: Mapping[Any, Any] | None = None
    kind: str = "any"

    def __repr__(self) -> str:
        return " or ".join(dict.fromkeys(name.lstrip(".") for name in self.names))


@dataclasses.dataclass(frozen=True)
class Given:
    """`then` where the key's value is not None, else `otherwise`."""

    key: Key
    then: Any
    otherwise: Any


@dataclasses.dataclass(frozen=True)
class Limit:
    """The key's number; None where it sets no limit: null, infinity, or 0 if `zero_is_none`."""

    key: Key
    zero_is_none: bool = False


@dataclasses.dataclass(frozen=True)
class Times:
    """The product of two keys."""

    left: Any
    right: Any


def _bool(value: Any) -> bool | None:
    return bool(value) if value is None or (type(value) in (bool, int) and value in (0, 1)) else None


def _number(value: Any) -> float | None:
    return float(value) if type(value) is float or (type(value) is int and abs(value) <= _LARGEST) else None


def _int(value: Any) -> int | None:
    return value if type(value) is int else None


# A function that converts a value, and returns None for one of another type; and the type for error messages. Values
# mean what they mean in transformers' Python code: null is false, 1 is true, and an int is a number.
KINDS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "any": (lambda value: value, ""),
    "bool": (_bool, "true or false"),
    "number": (_number, "a number"),
    "int": (_int, "an int"),
}


def key(*names: str, default: Any = MISSING, values: Mapping[Any, Any] | None = None, kind: str = "any") -> Key:
    """Returns the Key with these names.

    >>> resolve(key("n_shared", "num_shared", default=1), lambda name: {"num_shared": 2}.get(name, MISSING))
    2
    """
    return Key(names, default, values, kind)


def resolve(entry: Any, lookup: Lookup) -> Any:
    """Returns the value of a row's entry: keys are looked up, constants are returned unchanged.

    Raises ValueError that names a missing key.
    """
    if isinstance(entry, Mapping):
        return {name: resolve(inner, lookup) for name, inner in entry.items()}
    if isinstance(entry, Key):
        return _resolve_key(entry, lookup)
    if isinstance(entry, Given):
        return resolve(entry.then if find_value(entry.key, lookup) is not None else entry.otherwise, lookup)
    if isinstance(entry, Limit):
        limit = None if find_value(entry.key, lookup) is None else resolve(entry.key, lookup)
        return None if limit == math.inf or (limit == 0 and entry.zero_is_none) else limit
    if isinstance(entry, Times):
        return resolve(entry.left, lookup) * resolve(entry.right, lookup)
    return entry


def find_value(entry: Key, lookup: Lookup) -> Any:
    """Returns a key's value before translation. Raises ValueError where it is missing."""
    found = next((value for name in entry.names if (value := lookup(name)) is not MISSING), entry.default)
    if found is MISSING:
        raise ValueError(f"the model's config has no {entry!r}; expected a value for it")
    return found


def _resolve_key(entry: Key, lookup: Lookup) -> Any:
    found = find_value(entry, lookup)
    if entry.values is not None:
        if not isinstance(found, Hashable) or found not in entry.values:
            raise ValueError(
                f"{entry!r} is {found!r:.80} in the model's config; expected one of "
                f"{', '.join(map(repr, entry.values))}"
            )
        return resolve(entry.values[found], lookup)
    convert, expected = KINDS[entry.kind]
    value = convert(found)
    if value is None and expected:
        raise ValueError(f"{entry!r} is {found!r:.80} in the model's config; expected {expected}")
    return value
