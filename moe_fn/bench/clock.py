"""How the calls of a device are timed: the type of a clock, of which each device has its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Run = Callable[[], Any]
Timer = Callable[[Run], float]
How = Literal["wall", "graph", "events"]


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A contestant's calls, one for each input, as the clock will time them.

    how      "wall": as they are, with the host's clock; "graph": replays of CUDA graphs; "events": as they are, between
             CUDA events
    reason   why they are not graphs, where the clock would have liked that
    outputs  what a graph of the first input writes when it is replayed
    """

    runs: tuple[Run, ...]
    how: How
    reason: str | None = None
    outputs: Any = None


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How a device's calls are timed.

    time    milliseconds of one call
    ready   what a contestant's calls are turned into, before the turns
    launch  the least that can be timed, where that is not nothing
    """

    time: Timer
    ready: Callable[[tuple[Run, ...]], Ready]
    launch: Run | None = None
