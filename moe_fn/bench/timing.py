"""Turns and medians."""

import time
from collections.abc import Callable, Mapping

import torch

Run = Callable[[], object]
Timer = Callable[[Run], float]
TURNS = 5  # at least
WARM_UP_SECONDS = 1.0  # at most, but for one call, for each contestant


def timer_of_device(device: torch.device) -> Timer:
    """What measures one call, in milliseconds."""
    return _time_on_cuda if device.type == "cuda" else _time_on_cpu


def take_turns(runs: Mapping[str, Callable[[int], Run]], timer: Timer, seconds: float, inputs: int) -> dict[str, tuple[float, ...]]:
    """Milliseconds of every turn by name. runs[name](turn) makes ready, untimed, what that turn calls.

    Everybody runs once a turn, for a shared machine is fast in one second and slow in the next; the order rotates, for the one
    before leaves its traces in the cache. Until so many seconds are over, but at least TURNS turns.
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
        turn += 1
    return {name: tuple(values) for name, values in times.items()}


def _warm_up(run_of_turn: Callable[[int], Run], inputs: int) -> None:
    """Every input once, as far as the time goes: some libraries lay an expert's weights out when it is first visited."""
    end = time.perf_counter() + WARM_UP_SECONDS
    for turn in range(inputs):
        run_of_turn(turn)()
        if time.perf_counter() > end:
            break


def _time_on_cpu(run: Run) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _time_on_cuda(run: Run) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
