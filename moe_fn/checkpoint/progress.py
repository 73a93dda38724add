"""Progress of loading layers on stderr: a bar on a terminal, a line for each step otherwise."""

import sys
from dataclasses import dataclass

_WIDTH = 24


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The number of steps, the number of finished ones, and a label for the running one."""

    total: int
    done: int
    label: str

    def say(self, what: str) -> None:
        """Prints the running step."""
        text = f"{self.done + 1}/{self.total} {self.label}: {what}"
        if sys.stderr.isatty():
            filled = _WIDTH * self.done // self.total
            sys.stderr.write(f"\r\x1b[K[{'#' * filled}{'.' * (_WIDTH - filled)}] {text}"[:200])
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()


def clear() -> None:
    """Clears the bar from the terminal."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
