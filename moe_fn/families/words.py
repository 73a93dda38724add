"""Where a family's options stand: words of a model's config, or attributes of a live block.

A row holds words; `resolve` reads them.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Hashable, Mapping
from typing import Any

Look = Callable[[str], Any]  # the value that a word stands for, or MISSING
_LARGEST = sys.float_info.max


class _Missing:
    def __repr__(self) -> str:
        return "missing"


MISSING = _Missing()


class _Null:
    def __repr__(self) -> str:
        return "None"


# null where the model's class wants a value: no kind of word takes it, so that it is never read as "none" or False
NULL = _Null()


@dataclasses.dataclass(frozen=True)
class Word:
    """An option that the model says: the first of `names` that is there, else `default`.

    A name with a dot in front is an attribute of a block's own modules, which a config.json does not have.
    `values` translates what is found (a value that is not in it is an error); a Word among its values is resolved in
    turn. `kind` is a row of KINDS: what a value must be, where it is a number or a flag.
    """

    names: tuple[str, ...]
    default: Any = MISSING
    values: Mapping[Any, Any] | None = None
    kind: str = "any"

    def __repr__(self) -> str:
        return " or ".join(dict.fromkeys(name.lstrip(".") for name in self.names))


@dataclasses.dataclass(frozen=True)
class Given:
    """`then` where the word is given (it is not None), `otherwise` where it is not."""

    word: Word
    then: Any
    otherwise: Any


@dataclasses.dataclass(frozen=True)
class Limit:
    """The word's number; None where it is no limit: null, infinite, or 0 where `zero_is_none`."""

    word: Word
    zero_is_none: bool = False


@dataclasses.dataclass(frozen=True)
class Times:
    """The product of two words."""

    left: Any
    right: Any


def _flag(value: Any) -> bool | None:
    return bool(value) if value is None or (type(value) in (bool, int) and value in (0, 1)) else None


def _number(value: Any) -> float | None:
    return float(value) if type(value) is float or (type(value) is int and abs(value) <= _LARGEST) else None


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None


# What a word may be: a reader that gives None for anything else, and what it expects. Flags and numbers are as Python
# has them in transformers' blocks: null is false, 1 is true, and a whole number is a number.
KINDS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "any": (lambda value: value, ""),
    "flag": (_flag, "true or false"),
    "number": (_number, "a number"),
    "whole": (_whole, "a whole number"),
}


def word(*names: str, default: Any = MISSING, values: Mapping[Any, Any] | None = None, kind: str = "any") -> Word:
    """A Word of these names.

    >>> resolve(word("n_shared", "num_shared", default=1), lambda name: {"num_shared": 2}.get(name, MISSING))
    2
    """
    return Word(names, default, values, kind)


def resolve(value: Any, look: Look) -> Any:
    """What a row's entry stands for: words are looked up, everything else is itself.

    Raises ValueError naming what is missing.
    """
    if isinstance(value, Mapping):
        return {key: resolve(entry, look) for key, entry in value.items()}
    if isinstance(value, Word):
        return _resolve_word(value, look)
    if isinstance(value, Given):
        return resolve(value.then if find(value.word, look) is not None else value.otherwise, look)
    if isinstance(value, Limit):
        limit = None if find(value.word, look) is None else resolve(value.word, look)
        return None if limit == math.inf or (limit == 0 and value.zero_is_none) else limit
    if isinstance(value, Times):
        return resolve(value.left, look) * resolve(value.right, look)
    return value


def find(value: Word, look: Look) -> Any:
    """What a word is, untranslated. Raises ValueError where it is missing."""
    found = next((got for name in value.names if (got := look(name)) is not MISSING), value.default)
    if found is MISSING:
        raise ValueError(f"the model's config does not say {value!r}; expected one of them")
    return found


def _resolve_word(value: Word, look: Look) -> Any:
    found = find(value, look)
    if value.values is not None:
        if not isinstance(found, Hashable) or found not in value.values:
            raise ValueError(
                f"{value!r} is {found!r:.80} in the model's config; expected one of "
                f"{', '.join(map(repr, value.values))}"
            )
        return resolve(value.values[found], look)
    read, expected = KINDS[value.kind]
    made = read(found)
    if made is None and expected:
        raise ValueError(f"{value!r} is {found!r:.80} in the model's config; expected {expected}")
    return made
