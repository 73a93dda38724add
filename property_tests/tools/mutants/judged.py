"""One mutant in a process of its own: planted, tested, and what became of it."""

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

MEMORY = 8 << 30  # bytes of data; a mutated size may ask for more than there is
SECONDS = 240.0  # a mutant may loop for ever


@dataclass(frozen=True)
class Plan:
    """Tests called by name, arguments of pytest for what survives them, a profile of Hypothesis, and who has killed how
    many.
    """

    direct: tuple[str, ...]
    tests: tuple[str, ...]
    profile: str
    kills: Counter[str]
    seconds: float = SECONDS


def judged(mutant: Mutant | None, plan: Plan) -> tuple[str, str]:
    """("survived", "") or ("killed", by what), found out by a child process; None is the code as it is."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _in_child(mutant, plan, lambda name: os.write(writing, f"{name}\n".encode()))
    os.close(writing)
    code = exit_code(child, plan.seconds)
    with os.fdopen(reading) as pipe:
        told = pipe.read().splitlines()
    if code is None:
        return "killed", "no end in sight"
    if code < 0:
        return "killed", f"signal {-code}"
    return ("survived", "") if code == 0 else ("killed", told[0] if told else "no import")


def _in_child(mutant: Mutant | None, plan: Plan, tell: Callable[[str], Any]) -> None:
    """Plant and test; never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if mutant is not None:
            silence()
            plant(mutant)
        code = _tested(mutant, plan, tell)
    finally:
        os._exit(code)


def _tested(mutant: Mutant | None, plan: Plan, tell: Callable[[str], Any]) -> int:
    """0 if all is well."""
    if mutant is not None and doctest.testmod(importlib.import_module(mutant.module)).failed:
        tell("its doctest")
        return 1
    settings.load_profile(plan.profile)  # before the tests are imported
    for name in sorted(plan.direct, key=lambda name: -plan.kills[name]):
        module, _, function = name.partition(".")
        try:
            getattr(importlib.import_module(module), function)()
        except BaseException:
            tell(name)
            raise
    if not plan.tests:
        return 0
    options = ["-x", "-q", "--tb=line", "-p", "no:xdist", "-W", "ignore", f"--hypothesis-profile={plan.profile}"]
    return int(pytest.main([*options, *plan.tests], plugins=[Order(plan.kills, tell)]))


def plant(mutant: Mutant) -> None:
    """Put its code into the function that it changes, or have its module imported from its source."""
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
    """Functions and methods that the module defines, each once."""
    found = {}
    for value in list(vars(module).values()):
        for one in (value, *(vars(value).values() if isinstance(value, type) else ())):
            one = getattr(one, "__func__", one)
            if isinstance(getattr(one, "__code__", None), CodeType) and one.__module__ == module.__name__:
                found[id(one)] = one
    return list(found.values())


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from other source than its file's."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self.name, self.path, self.source = name, path, source

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """A spec for that module, and for no other."""
        return (
            importlib.util.spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None
        )

    def exec_module(self, module: ModuleType) -> None:
        """Run the mutated source."""
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)


class Order:
    """A pytest plugin: runs those tests first that have killed most, and tells which one fails."""

    def __init__(self, kills: Counter[str], tell: Callable[[str], Any]) -> None:
        self.kills, self.tell = kills, tell

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort; stable, so the order of judges.py stays where nothing is known."""
        items.sort(key=lambda item: -self.kills[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Tell the name of a test that fails."""
        if report.failed:
            self.tell(report.nodeid)
