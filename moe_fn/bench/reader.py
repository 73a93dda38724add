"""Memory bandwidth for the floor of a layer's time: reads a buffer larger than the caches, in every turn at other
addresses.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

BUFFER_BYTES = 2**30  # larger than any cache


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A buffer that is read at other addresses in every turn.

    name   how it is read
    whole  a turn always reads the whole buffer, and its time is multiplied by `share`
    """

    name: str
    buffer: Tensor
    read: Callable[[Tensor, int, int], object]
    whole: bool = False

    def share(self, num_bytes: float) -> float:
        """The fraction of a turn's time for this number of bytes."""
        return num_bytes / (self.buffer.numel() * self.buffer.itemsize) if self.whole else 1.0

    def run_of_turn(self, turn: int, num_bytes: int) -> Callable[[], None]:
        """The call that reads `num_bytes` in this turn.

        Turns read consecutive ranges of the buffer, and wrap around at its end.
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
