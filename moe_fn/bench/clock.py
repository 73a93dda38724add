"""Type of the clock that times calls of a layer on a device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Run = Callable[[], Any]
Timer = Callable[[Run], float]
How = Literal["wall", "graph", "events"]


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A contestant's calls, one for each input, ready to be timed.

    how      "wall": calls, by the host's clock; "graph": replays of CUDA graphs; "events": calls, between CUDA events
    reason   why they are not graphs, on a device whose clock uses graphs
    outputs  the outputs that a replay of the first input's graph writes
    """

    runs: tuple[Run, ...]
    how: How
    reason: str | None = None
    outputs: Any = None


@dataclass(frozen=True, kw_only=True)
class Clock:
    """The clock of a device.

    time    milliseconds of one call
    ready   prepares a contestant's calls before the turns
    launch  a call with the least measurable time, if that is not 0
    """

    time: Timer
    ready: Callable[[tuple[Run, ...]], Ready]
    launch: Run | None = None
