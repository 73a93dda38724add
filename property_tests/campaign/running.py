"""Runs a campaign: lines are appended to a file as problems finish, and a run continues where the last one stopped."""

import concurrent.futures
import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from campaign.checking import Line, check, line_of_dict
from moe_fn.bench.machine import machine
from moe_fn.kernels.native import library as native

LINES, ABOUT = "problems.jsonl", "about.json"
_AT_ONCE = 8  # problems that a worker takes together


def run(
    out: Path, problems: int, seed: int, workers: int = 1, seconds: float | None = None, level: str | None = None
) -> list[Line]:
    """Checks problems 0 .. problems - 1 of a seed that `out` has no line for, and stops after `seconds`. Returns all
    lines so far, sorted by index. `level`: of the C++ kernels, instead of this CPU's best.

    Laws
        A campaign that goes on is one that never stopped.

    Raises ValueError if `out` has a campaign of another seed.
    """
    out.mkdir(parents=True, exist_ok=True)
    _note(out, seed, level)
    done = {line.index for line in lines_of(out)}
    missing = [index for index in range(problems) if index not in done]
    deadline = None if seconds is None else time.monotonic() + seconds
    with (out / LINES).open("a") as file:
        for line in _checked(missing, seed, workers, deadline, level):
            file.write(json.dumps(line.to_dict()) + "\n")
            file.flush()
    return lines_of(out)


def lines_of(out: Path) -> list[Line]:
    """Returns the lines of a folder, sorted by index, each once; an incomplete last line is ignored."""
    path = out / LINES
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    lines = {line.index: line for line in (line_of_dict(json.loads(row)) for row in whole.splitlines())}
    return [lines[index] for index in sorted(lines)]


def about(out: Path) -> dict[str, Any]:
    """Returns the seed, and machine, versions and commit of every run."""
    found: dict[str, Any] = json.loads((out / ABOUT).read_text())
    return found


def _note(out: Path, seed: int, level: str | None) -> None:
    path = out / ABOUT
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"seed": seed, "runs": []}
    if known["seed"] != seed:
        raise ValueError(f"{path}: the campaign of seed {known['seed']}; expected seed {seed}, or another folder")
    known["runs"].append(machine(torch.device("cpu")) | ({} if level is None else {"level": level}))
    path.write_text(json.dumps(known, indent=1) + "\n")


def _checked(indices: list[int], seed: int, workers: int, deadline: float | None, level: str | None) -> Iterator[Line]:
    if workers == 1:
        _prepare(level)
        for index in indices:
            if _late(deadline):
                return
            yield check(seed, index)
        return
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=_prepare, initargs=(level,)
    ) as pool:
        jobs = iter([indices[start : start + _AT_ONCE] for start in range(0, len(indices), _AT_ONCE)])
        running = {pool.submit(_check_all, seed, job) for _, job in zip(range(2 * workers), jobs, strict=False)}
        while running:
            done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                yield from future.result()
                job = None if _late(deadline) else next(jobs, None)
                running |= set() if job is None else {pool.submit(_check_all, seed, job)}


def _check_all(seed: int, indices: list[int]) -> list[Line]:
    return [check(seed, index) for index in indices]


def _prepare(level: str | None) -> None:
    torch.set_num_threads(1)  # problems are tiny
    if level is not None:
        native.best_level = lambda: level  # type: ignore[assignment]


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline
