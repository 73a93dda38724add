"""Bytes as a sequence of decisions; after the last byte every decision is 0."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Reads decisions from bytes."""

    def __init__(self, data: bytes) -> None:
        self._rest: Iterator[int] = iter(data)

    def below(self, count: int) -> int:
        """Returns a number in 0 .. count - 1."""
        number, reach = 0, 1
        while reach < count:
            number, reach = number * 256 + next(self._rest, 0), reach * 256
        return number % count

    def one_of(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]
