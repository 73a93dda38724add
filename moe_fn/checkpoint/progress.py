"""Where the run is, on stderr: a bar on a terminal, else a line for each step."""

import sys
from dataclasses import dataclass

_WIDTH = 24


@dataclass(frozen=True, kw_only=True)
class Progress:
    """total steps, of which done are over; label says which one is running."""

    total: int
    done: int
    label: str

    def say(self, what: str) -> None:
        """Shows what is being done now."""
        text = f"{self.done + 1}/{self.total} {self.label}: {what}"
        if sys.stderr.isatty():
            filled = _WIDTH * self.done // self.total
            sys.stderr.write(f"\r\x1b[K[{'#' * filled}{'.' * (_WIDTH - filled)}] {text}"[:200])
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()


def clear() -> None:
    """Removes the bar."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
