"""A pytest plugin: which rows of the package's tables no test has looked up.

    PYTHONPATH=property_tests python -m pytest -n 2 -p rows_read property_tests

What processes look up that tests start is not seen. Tables are the module-level dicts in capitals. A row counts as read if it was asked
for by its key; tables that are walked from end to end say nothing here, and are listed with all of their rows.
"""

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest

OTHERS = ("bench", "campaign", "integrations.torchtitan", "integrations.vllm", "kernels.triton", "reference", "testing", "__main__")


class Table(dict[Any, Any]):
    """A dict that keeps the keys that it was asked for."""

    def __init__(self, rows: dict[Any, Any]) -> None:
        super().__init__(rows)
        self.read: set[Any] = set()

    def __getitem__(self, key: Any) -> Any:
        """Its row."""
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """Its row, if there is one."""
        self.read.add(key)
        return super().get(key, default)


def modules() -> Iterator[Any]:
    """The package's modules, but for those that name no option of the layer."""
    package = importlib.import_module("moe_fn")
    for found in pkgutil.walk_packages(package.__path__, "moe_fn."):
        if not any(other in found.name for other in OTHERS):
            yield importlib.import_module(found.name)


def pytest_configure(config: pytest.Config) -> None:
    """Put a table that remembers in place of every dict, wherever it was imported."""
    tables: dict[int, tuple[str, Table, Any]] = {}
    for module in modules():
        for name, value in vars(module).items():
            if type(value) is dict and name.isupper() and len(value) > 1 and id(value) not in tables:
                tables[id(value)] = (f"{module.__name__}.{name}", Table(value), value)  # the dict is kept: ids of the dead come again
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "moe_fn"]:
        for name, value in list(vars(module).items()):
            if id(value) in tables and value is tables[id(value)][2]:
                setattr(module, name, tables[id(value)][1])
    config.pluginmanager.register(Workers())
    config.stash[TABLES] = [(name, table) for name, table, _ in tables.values()]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of xdist sends what it has seen."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["read"] = {name: [repr(key) for key in table.read] for name, table in session.config.stash[TABLES]}


class Workers:
    """Hooks of xdist, where it is installed."""

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Add what a worker has seen."""
        for name, table in node.config.stash[TABLES]:
            seen = set(getattr(node, "workeroutput", {}).get("read", {}).get(name, ()))
            table.read |= {key for key in table if repr(key) in seen}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the rows that nobody has asked for."""
    for name, table in config.stash[TABLES]:
        unread = [key for key in table if key not in table.read]
        if unread:
            terminalreporter.write_line(f"{name}: {len(unread)} of {len(table)} rows not read: {', '.join(map(str, unread))}")


TABLES = pytest.StashKey[list[tuple[str, Table]]]()
