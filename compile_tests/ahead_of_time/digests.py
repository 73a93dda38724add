"""The digest of a case: equal as long as the compiler gets the same code, types and constants."""

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from compile_tests.ahead_of_time.case import Case
from shared_tests.sources import without_docstrings


def digest_of(case: Case) -> str:
    """12 hexadecimal digits. Comments, docstrings and places of lines do not count."""
    constants = sorted((name, repr(value)) for name, value in case.constants.items())
    given = (
        sorted(_code(case.kernel.fn)), sorted(case.types.items()), constants, case.warps, case.stages, case.tile,
        case.dtype, case.product, sorted(case.unaligned), case.fusion, case.bound,
    )  # fmt: skip
    return hashlib.sha256(repr(given).encode()).hexdigest()[:12]


@functools.cache
def _code(function: FunctionType) -> frozenset[str]:
    """The code of a kernel and of everything of ours that it names, as normalized text and values."""
    found: dict[FunctionType, str] = {}
    values: set[str] = set()
    waiting = [function]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(current)))
        found[current] = ast.unparse(without_docstrings(tree))
        for name, value in _named(tree, current.__globals__):
            inner = getattr(value, "fn", value)  # of a jitted function
            if isinstance(inner, FunctionType):
                waiting += [inner] if inner.__module__.split(".")[0] == "moe_fn" else []
            elif not isinstance(value, ModuleType | type):
                values.add(f"{name} = {getattr(value, 'value', value)!r}")  # of a constexpr
    return frozenset(found.values()) | values


def _named(tree: ast.AST, names: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of the globals that a function reads, and of attributes of our modules."""
    local = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    local |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names and node.id not in local:
            yield node.id, names[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id)
            if isinstance(module, ModuleType) and module.__name__.split(".")[0] == "moe_fn":
                yield f"{node.value.id}.{node.attr}", getattr(module, node.attr)
