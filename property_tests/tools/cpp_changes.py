"""The CPU kernels with one changed line: compiled beside what is there, and judged by the tests of a level, a process
each.
"""

import faulthandler
import importlib
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

from moe_fn.kernels.native import generated
from moe_fn.kernels.native import library as native
from tools.child_process import exit_code, silence

UNITS = ("backward", "kernels", "quantized", "binding")
# Which units are compiled again for a file; of the shared headers the floats' units alone, for they say all that the
# tests of floats see.
_FLOATS = ("backward", "kernels")
UNITS_OF: dict[str, tuple[str, ...]] = {
    "backward.cpp": ("backward",),
    "kernels.cpp": ("kernels",),
    "kernels.h": _FLOATS,
    "product.h": _FLOATS,
    "stream.h": _FLOATS,
    "panels.h": _FLOATS,
    "tile.h": _FLOATS,
    "activation.h": _FLOATS,
    "simd.h": _FLOATS,
    "forward.h": ("kernels",),
    "binding.cpp": ("binding",),
    "quant_arguments.h": ("binding",),
    "quantized.cpp": ("quantized",),
    "quantized.h": ("quantized",),
    "coded_rows.h": ("quantized",),
    "codes.h": ("quantized", "binding"),
    "decode.h": ("quantized",),
}
LEVEL = "avx2" if native.best_level().startswith("avx") else "plain"  # the quickest to compile that has vectors
NAME = "mutant"  # the level's name for the tests, and of its ops
# of the CPU for the tests of a mutant, which may loop for ever; ten times as many of the clock, which others use too
SECONDS = 200


@dataclass(frozen=True)
class Change:
    """A line of a file of the kernels, and what stands there instead."""

    file: str
    line: int  # from 0
    new: str

    def planted(self, text: str) -> str:
        """The file with the other line."""
        lines = text.split("\n")
        lines[self.line] = self.new
        return "\n".join(lines)


@dataclass(frozen=True)
class Workshop:
    """Objects of the kernels as they are, and a folder to compile others in; for a level, with more flags for those of
    floats.
    """

    level: str = LEVEL
    flags: tuple[str, ...] = ()
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="moe_fn_mutants_")))

    def __enter__(self) -> "Workshop":
        shutil.copytree(native.SOURCES, self.folder / "sources")
        (self.folder / generated.NAME).write_text(generated.header())
        self._compile("sources", UNITS)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder)

    def library(self, change: Change | None) -> Path:
        """The library with a change. Raises CalledProcessError if it is no C++."""
        if change is None:
            return self._linked("sources", ())
        own = tempfile.mkdtemp(dir=self.folder)
        shutil.copytree(native.SOURCES, own, dirs_exist_ok=True)
        path = Path(own) / change.file
        path.write_text(change.planted(path.read_text()))
        units = UNITS_OF[change.file]
        self._compile(Path(own).name, units)
        return self._linked(Path(own).name, units)

    def makes_no_difference(self, library: Path) -> bool:
        """Whether the compiler makes of the changed sources what it makes of those that are there, in every unit."""

        def same(unit: str) -> bool:
            return (library.parent / f"{unit}.o").read_bytes() == (self.folder / "sources" / f"{unit}.o").read_bytes()

        compiled = {path.stem for path in library.parent.glob("*.o")}
        if not all(map(same, compiled)):
            return False
        others = [unit for unit in UNITS if unit not in compiled]
        self._compile(library.parent.name, others)
        return all(map(same, others))

    def lines(self) -> dict[str, set[int]]:
        """Of each file, the lines (from 0) that the level compiles: no branch of the preprocessor that others take."""
        seen: dict[str, set[int]] = defaultdict(set)
        for unit in UNITS:
            command = [*_compiler(), *self._flags(), "-E", f"{unit}.cpp"]
            said = subprocess.run(
                command, check=True, capture_output=True, text=True, cwd=self.folder / "sources"
            ).stdout
            file, number = "", 0
            for line in said.splitlines():
                if place := re.match(r'# (\d+) "([^"]*)"', line):
                    number, file = int(place[1]) - 1, place[2]
                    continue
                if line.strip():
                    seen[file].add(number)
                number += 1
        return {file: _branches((native.SOURCES / file).read_text(), seen[file]) for file in UNITS_OF}

    def _flags(self) -> list[str]:
        flags = [flag for flag in native.FLAGS if flag != "-O3"] + ["-O1", "-w", "-fPIC", *native.LEVELS[self.level]]
        return [*flags, f"-DNAME=moe_fn_{NAME}", "-I..", *(f"-I{path}" for path in cpp_extension.include_paths())]

    def _compile(self, sources: str, units: Sequence[str]) -> None:
        for unit in units:  # by names alone: no path of the folder is in an object
            more = () if unit == "quantized" else self.flags
            command = [*_compiler(), *self._flags(), *more, "-c", f"{unit}.cpp", "-o", f"{unit}.o"]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL, cwd=self.folder / sources)

    def _linked(self, sources: str, units: Sequence[str]) -> Path:
        """Changed objects first: of an inline function that several hold, the linker takes the first."""
        objects = [self.folder / sources / f"{unit}.o" for unit in units]
        objects += [self.folder / "sources" / f"{unit}.o" for unit in UNITS if unit not in units]
        path = self.folder / sources / "mutant.so"
        libraries = [
            *(f"-L{folder}" for folder in cpp_extension.library_paths()),
            "-lc10",
            "-ltorch",
            "-ltorch_cpu",
            "-fopenmp",
            *self.flags,
        ]
        subprocess.run([*_compiler(), "-shared", *map(str, objects), *libraries, "-o", str(path)], check=True)
        return path


def _branches(text: str, seen: set[int]) -> set[int]:
    """All lines between two directives of which the preprocessor leaves one: it puts a macro's lines into its first
    one.
    """
    found: set[int] = set()
    branch: list[int] = []
    for number, line in enumerate([*text.split("\n"), "#"]):
        if not line.lstrip().startswith("#"):
            branch.append(number)
            continue
        found |= set(branch) if seen.intersection(branch) else set()
        branch = []
    return found


def _compiler() -> list[str]:
    return cpp_extension.get_cxx_compiler().split()


def run(library: Path, tests: Sequence[str], tell: Callable[[str], Any]) -> None:
    """Call tests, "module.function", for the level that the library is from now on."""
    torch.ops.load_library(library)
    found = native.Library(NAME, library, None)
    native.library = lambda level: found  # type: ignore[assignment]
    for test in tests:
        tell(test)
        module, _, function = test.partition(".")
        _call(getattr(importlib.import_module(module), function))


def judged(library: Path, tests: Sequence[str]) -> tuple[str, str]:
    """("survived", "") or ("killed", by what): the tests, as `run` has them, are called until one fails."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, 2 * SECONDS))
            silence()
            run(library, tests, lambda test: os.write(writing, f"{test}\n".encode()))
            code = 0
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".partition("\n")[0][:200].encode())
        finally:
            os._exit(code)
    os.close(writing)
    status = exit_code(child, 10 * SECONDS)
    with os.fdopen(reading, errors="replace") as pipe:
        told = pipe.read().splitlines()
    if status == 0:
        return "survived", ""
    by = next((line for line in reversed(told) if line in tests), "loading")
    endless = status is None or status == -signal.SIGXCPU
    return "killed", f"{by}: " + (
        "no end in sight" if endless else f"signal {-status}" if status and status < 0 else told[-1]
    )


def _call(test: Any) -> None:
    """The test, for the library's level if it is given one, with all that its other parameters may be."""
    given = [mark.args for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    marks = [mark for mark in given if mark[0] != "level"]
    level = {"level": NAME} if len(marks) < len(given) else {}
    for values in product(*(values for _, values in marks)):
        arguments = {}
        for (names, _), value in zip(marks, values, strict=True):
            arguments |= {names: value} if isinstance(names, str) else dict(zip(names, value, strict=True))
        test(**level, **arguments)
