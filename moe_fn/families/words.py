"""Where a family's options stand: words of a model's config, or attributes of a live block. A row holds words; `resolve` reads them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

Look = Callable[[str], Any]  # the value that a word stands for, or MISSING


class _Missing:
    def __repr__(self) -> str:
        return "missing"


MISSING = _Missing()


@dataclasses.dataclass(frozen=True)
class Word:
    """An option that the model says: the first of `names` that is there, else `default`.

    A name with a dot in front is an attribute of a block's own modules, which a config.json does not have.
    `values` translates what is found (a value that is not in it is an error); a Word among its values is resolved in turn.
    """

    names: tuple[str, ...]
    default: Any = MISSING
    values: Mapping[Any, Any] | None = None

    def __repr__(self) -> str:
        return " or ".join(name.lstrip(".") for name in self.names)


@dataclasses.dataclass(frozen=True)
class Given:
    """`then` where the word is given (it is not None), `otherwise` where it is not."""

    word: Word
    then: Any
    otherwise: Any


@dataclasses.dataclass(frozen=True)
class Positive:
    """The word's number; None where it is no limit: absent, not above 0, or infinite."""

    word: Word


@dataclasses.dataclass(frozen=True)
class Times:
    """The product of two words; 0 where one of them is None."""

    left: Any
    right: Any


def word(*names: str, default: Any = MISSING, values: Mapping[Any, Any] | None = None) -> Word:
    """A Word of these names.

    >>> resolve(word("n_shared", "num_shared", default=1), lambda name: {"num_shared": 2}.get(name, MISSING))
    2
    """
    return Word(names, default, values)


def whole(value: Any, look: Look) -> int:
    """What a row's entry stands for, a whole number; None is 0. Raises ValueError for anything else."""
    found = resolve(value, look)
    if type(found) not in (int, type(None)):
        raise ValueError(f"{value!r} is {found!r:.80} in the model's config; expected a whole number")
    return found or 0


def resolve(value: Any, look: Look) -> Any:
    """What a row's entry stands for: words are looked up, everything else is itself. Raises ValueError naming what is missing."""
    if isinstance(value, Mapping):
        return {key: resolve(entry, look) for key, entry in value.items()}
    if isinstance(value, Word):
        found = next((got for name in value.names if (got := look(name)) is not MISSING), value.default)
        if found is MISSING:
            raise ValueError(f"the model's config does not say {value!r}; expected one of them")
        if value.values is None:
            return found
        if found not in value.values:
            raise ValueError(f"{value!r} is {found!r:.80} in the model's config; expected one of {', '.join(map(repr, value.values))}")
        return resolve(value.values[found], look)
    if isinstance(value, Given):
        return resolve(value.then if resolve(value.word, look) is not None else value.otherwise, look)
    if isinstance(value, Positive):
        limit = resolve(value.word, look)
        return None if limit is None or not 0 < limit < math.inf else float(limit)
    if isinstance(value, Times):
        return whole(value.left, look) * whole(value.right, look)
    return value
