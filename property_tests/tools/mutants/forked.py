"""Tests mutants of an area in forks of a process that has collected the tests; each fork runs only tests that call the
changed function.

A fork neither imports nor collects, so a mutant costs as much as the first test that fails. Changes that act at import
or in other processes have no effect in a fork: survivors are tested again in a copy of the tree (`copied.py`).
"""

import doctest
import gc
import importlib
import json
import math
import os
import pickle
import resource
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol
from hypothesis import settings

from tools import ROOT
from tools.child_process import exit_code, silence
from tools.mutants.areas import AREAS
from tools.mutants.judged import plant
from tools.mutants.made import Mutant, functions_of, source_hash

# (file, function): (index of a test that calls it, seconds of the test)
Covered = Mapping[tuple[str, str], Sequence[tuple[int, float]]]


def sample_in_forks(found: Path, names: Sequence[str], per_file: int) -> None:
    """Appends a line of JSON for each sampled mutant inside a function that `found` does not contain."""
    found.parent.mkdir(parents=True, exist_ok=True)
    done = {json.loads(line)["id"] for line in found.read_text().splitlines()} if found.exists() else set()
    for name in names:
        area = AREAS[name]
        todo = [m for file in area.paths for m in area.made(file, per_file) if m.inside and m.id not in done]

        def write(mutant: Mutant, verdict: str, by: str, seconds: float, name: str = name) -> None:
            line = {
                **mutant.described,
                "area": name,
                "of": source_hash(mutant.file),
                "verdict": verdict,
                "by": by,
                "seconds": round(seconds),
            }
            with found.open("a") as out:
                out.write(json.dumps({**line, "forked": True}) + "\n")
            print(f"{mutant.file}:{mutant.line} {verdict} {by or mutant.change}", flush=True)

        child = os.fork()  # pytest can run only once in a process
        if child == 0:
            code = 1
            try:
                in_forks(todo, area.tests, write)
                code = 0
            finally:
                os._exit(code)
        if os.waitpid(child, 0)[1] != 0:
            raise RuntimeError(f"{name}: the tests fail for the code as it is, or the runner broke")


def in_forks(mutants: Sequence[Mutant], tests: Sequence[str], found: Callable[[Mutant, str, str, float], None]) -> None:
    """Calls found(mutant, "killed" or "survived", by which test, seconds) for each mutant, all inside functions."""
    settings.load_profile("mutants")
    options = [
        "-q",
        "--tb=no",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "--hypothesis-profile=mutants",
    ]
    code = pytest.main([*options, *tests], plugins=[_Forks(mutants, found)])
    if code != 0:
        raise RuntimeError(f"pytest ended with {code}")


class _Forks:
    """A pytest plugin that runs the tests in a fork for every mutant instead of once."""

    def __init__(self, mutants: Sequence[Mutant], found: Callable[[Mutant, str, str, float], None]) -> None:
        self.mutants, self.found = mutants, found
        self.kills: Counter[int] = Counter()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Runs all tests once and records the functions that they call; then those of each mutant until one fails."""
        gc.collect()
        gc.freeze()
        files = {mutant.file for mutant in self.mutants}
        status, said = _child(lambda: _covered(session.items, files), 3600.0)
        if status != 0:
            raise RuntimeError(f"the code as it is fails {said.decode()}")
        covered: Covered = pickle.loads(said)
        for mutant in self.mutants:
            start = time.monotonic()
            tests = sorted(
                covered.get((mutant.file, _function(mutant)), ()), key=lambda test: (-self.kills[test[0]], test[1])
            )
            limit_s = 3 * sum(seconds for _, seconds in tests) + 60
            status, said = _child(
                partial(_first_failing, session.items, mutant, [number for number, _ in tests]), limit_s
            )
            failing = int(said) if status == 0 and said else None
            self.kills.update([] if failing is None else [failing])
            name = "" if failing is None else "its doctest" if failing == -1 else session.items[failing].nodeid
            by = name if status == 0 else f"status {status}: {said.decode()}"
            self.found(mutant, "killed" if by else "survived", by, time.monotonic() - start)
        return True


def _covered(items: Sequence[pytest.Item], files: set[str]) -> bytes:
    """Runs every test. Returns the pickled `Covered`."""
    paths = {str(ROOT / file): file for file in files}
    covered = defaultdict(list)
    for number, item in enumerate(items):
        seen: set[tuple[str, str]] = set()
        start = time.process_time()
        with _calls(paths, seen):
            if why := _failed(item):
                raise RuntimeError(f"{item.nodeid}: {why}")
        for function in seen:
            covered[function].append((number, time.process_time() - start))
    return pickle.dumps(dict(covered))


@contextmanager
def _calls(paths: Mapping[str, str], seen: set[tuple[str, str]]) -> Iterator[None]:
    """A context that records the functions of these files that are called in it: (file, qualified name)."""

    def called(frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if code.co_filename in paths:
            seen.add((paths[code.co_filename], code.co_qualname.partition(".<locals>")[0]))

    sys.settrace(called)
    try:
        yield
    finally:
        sys.settrace(None)


def _first_failing(items: Sequence[pytest.Item], mutant: Mutant, tests: Sequence[int]) -> bytes:
    """Returns the index of the first test that fails with the mutant, or nothing; -1 is the module's doctest."""
    plant(mutant)
    if doctest.testmod(importlib.import_module(mutant.module)).failed:
        return b"-1"
    return next((str(number).encode() for number in tests if _failed(items[number])), b"")


def _failed(item: pytest.Item) -> str:
    """Returns the error of a test, or an empty string if it passes."""
    return next(
        (
            report.longreprtext or "failed"
            for report in runtestprotocol(item, log=False, nextitem=None)
            if report.failed
        ),
        "",
    )


def _function(mutant: Mutant) -> str:
    """Returns the qualified name of the changed function."""
    old, new = (functions_of(compile(text, "", "exec")) for text in ((ROOT / mutant.file).read_text(), mutant.source))
    return next(name for name in old if old[name] != new[name])


def _child(work: Callable[[], bytes], cpu_seconds: float) -> tuple[int | None, bytes]:
    """Runs work() in a child process. Returns (exit status, None after the limit; what work() returns)."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setpgid(0, 0)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(cpu_seconds), math.ceil(cpu_seconds) + 10))
                silence()
                output.write(work())
                code = 0
            except Exception as error:
                output.write(repr(error).encode())
            finally:
                output.flush()
                os._exit(code)
        status = exit_code(child, 20 * cpu_seconds)
        output.seek(0)
        return status, output.read()
