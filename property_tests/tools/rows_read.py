"""A pytest plugin that lists the rows of the package's tables that no test has looked up.

    PYTHONPATH=property_tests python -m pytest -n 2 -p tools.rows_read property_tests

Tables are module-level dicts in capitals that a function uses; other dicts are parts of rows, merged at import. A row
counts as read if it was looked up by its key. For a table with unread rows the plugin prints these rows and the
functions that iterated over the table: iteration by a test over the whole table, or by a function that uses all rows,
is as good as a lookup, which the reader must decide. Lookups in graphs of torch.compile and in other processes are not
recorded.
"""

import ast
import contextlib
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

OTHERS = ("bench", "kernels.triton", "reference", "testing", "__main__")


class Table(dict[Any, Any]):
    """A dict that records the keys that were looked up and the names of functions that iterated over it."""

    def __init__(self, rows: dict[Any, Any]) -> None:
        super().__init__(rows)
        self.read: set[Any] = set()
        self.callers: set[str] = set()

    def __getitem__(self, key: Any) -> Any:
        """Its row."""
        if not torch.compiler.is_compiling():
            self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """Its row, if there is one."""
        if not torch.compiler.is_compiling():
            self.read.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[Any]:
        """Its keys."""
        self.record_caller()
        return super().__iter__()

    def keys(self) -> Any:
        """Its keys."""
        self.record_caller()
        return super().keys()

    def values(self) -> Any:
        """Its rows."""
        self.record_caller()
        return super().values()

    def items(self) -> Any:
        """Its keys and rows."""
        self.record_caller()
        return super().items()

    def record_caller(self) -> None:
        """Records the name of the function that iterates: the innermost caller that is not a comprehension."""
        if torch.compiler.is_compiling():
            return
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_code.co_name.startswith("<") and frame.f_code.co_name != "<module>":
            frame = frame.f_back
        self.callers.add(f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_name}")


def modules() -> Iterator[Any]:
    """The package's modules, without those that have no option of the layer or need a package that is not installed."""
    package = importlib.import_module("moe_fn")
    for found in pkgutil.walk_packages(package.__path__, "moe_fn."):
        if not any(other in found.name for other in OTHERS):
            with contextlib.suppress(ImportError):
                yield importlib.import_module(found.name)


def names_in_functions(module: Any) -> set[str]:
    """The global names that a module's functions use."""
    functions = (
        node
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.FunctionDef | ast.Lambda)
    )
    return {name.id for function in functions for name in ast.walk(function) if isinstance(name, ast.Name)}


def pytest_configure(config: pytest.Config) -> None:
    """Replaces every such dict by a recording table, in all modules that imported it."""
    tables: dict[int, tuple[str, Table, Any]] = {}
    used: set[int] = set()
    for module in modules():
        names = names_in_functions(module)
        for name, value in vars(module).items():
            if type(value) is dict and name.isupper() and len(value) > 1 and id(value) not in tables:
                # the dict is kept alive, as its id could be reused
                tables[id(value)] = (f"{module.__name__}.{name}", Table(value), value)
            if name in names:
                used.add(id(value))
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "moe_fn"]:
        for name, value in list(vars(module).items()):
            if id(value) in tables and value is tables[id(value)][2]:
                setattr(module, name, tables[id(value)][1])
    config.pluginmanager.register(Workers())
    config.stash[TABLES] = [(name, table) for place, (name, table, _) in tables.items() if place in used]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Sends what a worker of xdist has recorded."""
    if hasattr(session.config, "workeroutput"):
        seen = {
            name: ([repr(key) for key in table.read], sorted(table.callers))
            for name, table in session.config.stash[TABLES]
        }
        session.config.workeroutput["read"] = seen


class Workers:
    """Hooks of xdist, where it is installed."""

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Adds what a worker has recorded."""
        for name, table in node.config.stash[TABLES]:
            read, callers = getattr(node, "workeroutput", {}).get("read", {}).get(name, ((), ()))
            table.read |= {key for key in dict.keys(table) if repr(key) in set(read)}
            table.callers |= set(callers)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints the rows that no test has looked up."""
    for name, table in config.stash[TABLES]:
        unread = [key for key in dict.keys(table) if key not in table.read]
        if unread:
            rows, callers = (
                ", ".join(f"{key!r:.60}" for key in unread),
                ", ".join(sorted(table.callers)) or "no function",
            )
            terminalreporter.write_line(
                f"{name}: {len(unread)} of {len(table)} rows not read: {rows}; iterated over by {callers}"
            )


TABLES = pytest.StashKey[list[tuple[str, Table]]]()
