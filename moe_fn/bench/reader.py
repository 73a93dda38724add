"""A buffer larger than the caches, read at other addresses in every turn."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

BUFFER_BYTES = 2**30  # more than any cache holds


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A buffer that is read at other addresses in every turn; name says with what.

    whole: a turn reads all of it whatever it is asked for, and its time counts by `share`.
    """

    name: str
    buffer: Tensor
    read: Callable[[Tensor, int, int], object]
    whole: bool = False

    def share(self, num_bytes: float) -> float:
        """Which part of a turn's time so many bytes take."""
        return num_bytes / (self.buffer.numel() * self.buffer.itemsize) if self.whole else 1.0

    def run_of_turn(self, turn: int, num_bytes: int) -> Callable[[], None]:
        """The call that reads so many bytes.

        Turns follow one another through the buffer, and begin again at its end.
        """
        size = self.buffer.numel() * self.buffer.itemsize
        if self.whole:
            turn, num_bytes = 0, size
        num_bytes = max(64, num_bytes // 64 * 64)
        pieces, first = [], turn * num_bytes % size
        while num_bytes > 0:
            piece = min(num_bytes, size - first)
            pieces.append((first, piece))
            first, num_bytes = 0, num_bytes - piece

        def run() -> None:
            for first_byte, piece in pieces:
                self.read(self.buffer, first_byte, piece)

        return run
