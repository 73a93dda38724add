"""Mutants of a file, made by mutmut: the whole source of each, and the line that changed."""

import difflib
import hashlib
import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import CodeType
from typing import Any, TypeVar

from mutmut.mutation.file_mutation import create_mutations

from tools import ROOT

T = TypeVar("T")


@dataclass(frozen=True)
class Mutant:
    """A file of the package with one change."""

    file: str
    line: int
    change: str
    inside: bool  # the change is inside a function whose code can be replaced
    source: str

    @property
    def module(self) -> str:
        """The name of its module."""
        return self.file.removesuffix(".py").replace("/", ".")

    @cached_property
    def id(self) -> str:
        """An id that is equal for the same change of the same source."""
        return hashlib.sha256(f"{self.file}\0{self.source}".encode()).hexdigest()[:16]

    @property
    def described(self) -> dict[str, Any]:
        """All fields except the source, for JSON."""
        return {"id": self.id, "file": self.file, "line": self.line, "change": self.change}


def mutants_of(file: str, count: int | None = None) -> list[Mutant]:
    """Returns every mutant of a file, or a deterministic sample of `count`.

    A mutant that two operators make is listed once.
    """
    before = (ROOT / file).read_text()
    module, mutations, _, _ = create_mutations(file, before)
    if count is not None:
        mutations = sampled(file, mutations, count)
    made = {}
    for mutation in mutations:
        source = module.deep_replace(mutation.original_node, mutation.mutated_node).code
        line, change = _change(before.splitlines(), source.splitlines())
        made[source] = Mutant(file, line, change, _inside(before, source), source)
    return list(made.values())


def source_hash(file: str) -> str:
    """Returns the hash of a file."""
    return hashlib.sha256((ROOT / file).read_bytes()).hexdigest()[:16]


def sampled(file: str, mutations: Sequence[T], count: int) -> list[T]:
    """Returns a sample of `count` of a file's mutations, which depends on the file's name and their number only.

    >>> sampled("a.py", range(100), 3) == sampled("a.py", range(100), 3)
    True
    """
    return random.Random(file).sample(mutations, min(count, len(mutations)))


def functions_of(module: CodeType) -> dict[str, CodeType]:
    """Returns the functions and methods in the code of a module, by qualified name."""
    found: dict[str, CodeType] = {}
    for const in module.co_consts:
        if isinstance(const, CodeType) and "<" not in const.co_qualname:
            found |= {const.co_qualname: const} if _is_function(const) else functions_of(const)
    return found


def _is_function(code: CodeType) -> bool:
    return bool(code.co_flags & inspect.CO_OPTIMIZED)


def _inside(before: str, after: str) -> bool:
    """Whether exactly one function has changed and nothing outside of functions (defaults, tables, classes)."""
    modules = [compile(text, "", "exec") for text in (before, after)]
    old, new = (functions_of(module) for module in modules)
    changed = [name for name in old if name in new and old[name] != new[name]]
    return len(changed) == 1 and _skeleton(modules[0]) == _skeleton(modules[1]) and not old[changed[0]].co_freevars


def _skeleton(code: CodeType) -> tuple[Any, ...]:
    """Returns the code without that of its named functions."""
    consts = [
        ("function" if _is_function(c) and "<" not in c.co_qualname else _skeleton(c))
        if isinstance(c, CodeType)
        else (type(c), c)
        for c in code.co_consts
    ]
    return code.co_code, code.co_names, consts


def _change(before: list[str], after: list[str]) -> tuple[int, str]:
    """Returns (number of the first line that differs, the difference as "old -> new")."""
    codes = difflib.SequenceMatcher(None, before, after, False).get_opcodes()
    _, first, last, start, end = next(code for code in codes if code[0] != "equal")
    old, new = (
        " ".join(line.partition("  #")[0].strip() for line in lines) for lines in (before[first:last], after[start:end])
    )
    return first + 1, f"{old} -> {new}"
