"""Tests one mutant in its own process."""

import doctest
import importlib
import importlib.abc
import importlib.util
import os
import resource
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest
from hypothesis import settings

from tools import ROOT
from tools.child_process import exit_code, silence
from tools.mutants.made import Mutant, functions_of

MEMORY = 8 << 30  # bytes of data; a mutated size may request more than the machine has
SECONDS = 240.0  # a mutant may loop forever


@dataclass(frozen=True)
class Plan:
    """Tests that are called by name, arguments of pytest for what survives them, a profile of Hypothesis, and the
    number of mutants that each test has killed.
    """

    direct: tuple[str, ...]
    tests: tuple[str, ...]
    profile: str
    kills: Counter[str]
    seconds: float = SECONDS


def judged(mutant: Mutant | None, plan: Plan) -> tuple[str, str]:
    """Tests a mutant, or the unchanged code, in a child process. Returns ("survived", "") or ("killed", by what)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _in_child(mutant, plan, lambda name: os.write(writing, f"{name}\n".encode()))
    os.close(writing)
    code = exit_code(child, plan.seconds)
    with os.fdopen(reading) as pipe:
        output = pipe.read().splitlines()
    if code is None:
        return "killed", "no end in sight"
    if code < 0:
        return "killed", f"signal {-code}"
    return ("survived", "") if code == 0 else ("killed", output[0] if output else "no import")


def _in_child(mutant: Mutant | None, plan: Plan, report: Callable[[str], Any]) -> None:
    """Plants and tests the mutant, and exits."""
    code = 1
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if mutant is not None:
            silence()
            plant(mutant)
        code = _tested(mutant, plan, report)
    finally:
        os._exit(code)


def _tested(mutant: Mutant | None, plan: Plan, report: Callable[[str], Any]) -> int:
    """Returns 0 if all tests pass; report(name) is called with a test that fails."""
    if mutant is not None and doctest.testmod(importlib.import_module(mutant.module)).failed:
        report("its doctest")
        return 1
    settings.load_profile(plan.profile)  # before the tests are imported
    for name in sorted(plan.direct, key=lambda name: -plan.kills[name]):
        module, _, function = name.partition(".")
        try:
            getattr(importlib.import_module(module), function)()
        except BaseException:
            report(name)
            raise
    if not plan.tests:
        return 0
    options = ["-x", "-q", "--tb=line", "-p", "no:xdist", "-W", "ignore", f"--hypothesis-profile={plan.profile}"]
    return int(pytest.main([*options, *plan.tests], plugins=[Order(plan.kills, report)]))


def plant(mutant: Mutant) -> None:
    """Replaces the code of the changed function, or makes the module import from the changed source."""
    if "moe_fn" not in sys.modules:
        sys.meta_path.insert(0, Mutated(mutant.module, ROOT / mutant.file, mutant.source))
        importlib.import_module("moe_fn")
        return
    module = importlib.import_module(mutant.module)
    new = functions_of(compile(mutant.source, str(ROOT / mutant.file), "exec"))
    changed = 0
    for function in _functions_in(module):
        code = new.get(function.__code__.co_qualname)
        if code is not None and code != function.__code__:
            function.__code__ = code
            changed += 1
    assert changed == 1, f"{mutant.change}: {changed} functions have changed"


def _functions_in(module: ModuleType) -> list[Any]:
    """Returns the functions and methods that the module defines, each once."""
    found = {}
    for value in list(vars(module).values()):
        for one in (value, *(vars(value).values() if isinstance(value, type) else ())):
            one = getattr(one, "__func__", one)
            if isinstance(getattr(one, "__code__", None), CodeType) and one.__module__ == module.__name__:
                found[id(one)] = one
    return list(found.values())


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An importer of one module from a changed source."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self.name, self.path, self.source = name, path, source

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """Returns a spec for that module only."""
        return (
            importlib.util.spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None
        )

    def exec_module(self, module: ModuleType) -> None:
        """Runs the changed source."""
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)


class Order:
    """A pytest plugin that runs the tests that have killed most first, and reports the one that fails."""

    def __init__(self, kills: Counter[str], report: Callable[[str], Any]) -> None:
        self.kills, self.report = kills, report

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sorts by kills; the sort is stable, so tests without kills keep the order of judges.py."""
        items.sort(key=lambda item: -self.kills[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Reports the name of a test that fails."""
        if report.failed:
            self.report(report.nodeid)
