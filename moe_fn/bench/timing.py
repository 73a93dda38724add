"""Times implementations of a layer in turns; percentiles, and the clock of a device."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from moe_fn.bench.clock import Clock, Ready, Run, Timer

TURNS = 5  # at least
WARM_UP_SECONDS = 1.0  # limit per contestant, but at least one call


# How calls are timed, by type of device.
METHODS = {
    "cpu": "the host's clock around a call",
    "cuda": "a CUDA graph for each input, replayed between two events on a stream that is busy until then; before each "
    "replay a buffer of several times the L2 cache is written and read, untimed; contestants that cannot be captured "
    "are called between the events",
}


def clock_of_device(device: torch.device) -> Clock:
    """A new clock of the device; one is made for each number of tokens."""
    if device.type == "cuda":
        from moe_fn.bench.timing_cuda import clock_on_cuda

        return clock_on_cuda(device)
    return Clock(time=_time_on_cpu, ready=lambda runs: Ready(runs=runs, how="wall"))


def take_turns(
    runs: Mapping[str, Callable[[int], Run]],
    timer: Timer,
    seconds: float,
    inputs: int,
    rests: Mapping[str, float] | None = None,
) -> dict[str, tuple[float, ...]]:
    """Milliseconds of every turn by name. runs[name](turn) returns, untimed, the call of that turn.

    rests: milliseconds to wait after a call of that name, while its threads are still active.

    Every contestant runs once per turn, since the speed of a shared machine changes from second to second; the order
    rotates, since each contestant changes the cache for the next. Runs for `seconds`, and at least TURNS turns.
    """
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        _warm_up(runs[name], inputs)
    end, turn = time.perf_counter() + seconds, 0
    while turn < TURNS or time.perf_counter() < end:
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            run = runs[name](turn)
            times[name].append(timer(run))
            if rests and name in rests:
                time.sleep(rests[name] / 1e3)
        turn += 1
    return {name: tuple(values) for name, values in times.items()}


def percentile(values: Sequence[float], percent: float) -> float:
    """A percentile of the values, with linear interpolation.

    >>> percentile([4.0, 1.0, 2.0], 50), percentile([0.0, 10.0], 90)
    (2.0, 9.0)
    """
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _warm_up(run_of_turn: Callable[[int], Run], inputs: int) -> None:
    """Runs every input once within WARM_UP_SECONDS: some libraries convert an expert's weights at its first use."""
    end = time.perf_counter() + WARM_UP_SECONDS
    for turn in range(inputs):
        run_of_turn(turn)()
        if time.perf_counter() > end:
            break


def _time_on_cpu(run: Run) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3
