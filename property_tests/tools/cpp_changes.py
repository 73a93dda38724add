"""The CPU kernels with one changed line: compiled for one level, and tested in a process each."""

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

# Units to compile again for a changed file. For shared headers only those of floats, which contain all that the tests
# of floats run.
_FLOATS = ("backward", "kernels")
UNITS_OF: dict[str, tuple[str, ...]] = {
    "backward.cpp": ("backward",),
    "kernels.cpp": ("kernels",),
    "lora.cpp": ("lora",),
    "lora.h": (*_FLOATS, "lora"),
    "lora_backward.h": ("backward",),
    "kernels.h": _FLOATS,
    "product.h": _FLOATS,
    "stream.h": _FLOATS,
    "panels.h": _FLOATS,
    "tile.h": _FLOATS,
    "amx.h": _FLOATS,
    "emulated_amx.h": _FLOATS,
    "activation.h": _FLOATS,
    "simd.h": _FLOATS,
    "forward.h": ("kernels",),
    "router.cpp": ("router",),
    "router.h": ("router", "binding"),
    "router_arguments.h": ("binding",),
    "binding.cpp": ("binding",),
    "quant_arguments.h": ("binding",),
    "quantized.cpp": ("quantized",),
    "quantized.h": ("quantized",),
    "decoded.h": ("quantized",),
    "coded_rows.h": ("quantized",),
    "codes.h": ("quantized", "binding"),
    "decode.h": ("quantized",),
}
LEVEL = "plain" if native.best_level() == "plain" else "avx2"  # the quickest to compile that has vectors
NAME = "mutant"  # the level's name for the tests, and of its ops
# CPU seconds for the tests of a mutant, which may loop forever; the limit of elapsed time is ten times as long
SECONDS = 200


@dataclass(frozen=True)
class Change:
    """A change of one line in a file of the kernels."""

    file: str
    line: int  # from 0
    new: str

    def planted(self, text: str) -> str:
        """Returns the file with the changed line."""
        lines = text.split("\n")
        lines[self.line] = self.new
        return "\n".join(lines)


@dataclass(frozen=True)
class Workshop:
    """Object files of the unchanged kernels for a level, and a folder to compile changed ones in.

    Units of floats are compiled with additional flags.
    """

    level: str = LEVEL
    flags: tuple[str, ...] = ()
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="moe_fn_mutants_")))

    def __enter__(self) -> "Workshop":
        shutil.copytree(native.SOURCES, self.folder / "sources")
        (self.folder / generated.NAME).write_text(generated.header())
        self._compile("sources", native.UNITS)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder)

    def library(self, change: Change | None) -> Path:
        """Compiles the library with a change. Raises CalledProcessError if the change does not compile."""
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
        """Whether every unit of the changed sources compiles to the same object code as the unchanged one."""

        def same(unit: str) -> bool:
            return (library.parent / f"{unit}.o").read_bytes() == (self.folder / "sources" / f"{unit}.o").read_bytes()

        compiled = {path.stem for path in library.parent.glob("*.o")}
        if not all(map(same, compiled)):
            return False
        others = [unit for unit in native.UNITS if unit not in compiled]
        self._compile(library.parent.name, others)
        return all(map(same, others))

    def lines(self) -> dict[str, set[int]]:
        """The lines (from 0) of each file that the level compiles, without preprocessor branches of other levels."""
        seen: dict[str, set[int]] = defaultdict(set)
        for unit in native.UNITS:
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
        flags = [flag for flag in native.FLAGS if flag != "-O3"] + ["-O1", "-w", "-fPIC", *native.flags_of(self.level)]
        return [*flags, f"-DNAME=moe_fn_{NAME}", "-I..", *(f"-I{path}" for path in cpp_extension.include_paths())]

    def _compile(self, sources: str, units: Sequence[str]) -> None:
        for unit in units:  # relative names, so that the object code does not contain the folder's path
            more = () if unit == "quantized" else self.flags
            command = [*_compiler(), *self._flags(), *more, "-c", f"{unit}.cpp", "-o", f"{unit}.o"]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL, cwd=self.folder / sources)

    def _linked(self, sources: str, units: Sequence[str]) -> Path:
        """Links the library; changed objects first, as the linker takes an inline function's first definition."""
        objects = [self.folder / sources / f"{unit}.o" for unit in units]
        objects += [self.folder / "sources" / f"{unit}.o" for unit in native.UNITS if unit not in units]
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
    """Adds to the seen lines those between two directives where the preprocessor keeps at least one.

    It puts all lines of a macro call into the first one.
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


def run(library: Path, tests: Sequence[str], report: Callable[[str], Any]) -> None:
    """Calls tests, "module.function", with this library as the only level; report(name) is called before each."""
    torch.ops.load_library(library)
    found = native.Library(NAME, library, None)
    native.library = lambda level: found  # type: ignore[assignment]
    for test in tests:
        report(test)
        module, _, function = test.partition(".")
        _call(getattr(importlib.import_module(module), function))


def judged(library: Path, tests: Sequence[str]) -> tuple[str, str]:
    """Runs the tests (as in `run`) until one fails. Returns ("survived", "") or ("killed", by what)."""
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
        output = pipe.read().splitlines()
    if status == 0:
        return "survived", ""
    by = next((line for line in reversed(output) if line in tests), "loading")
    endless = status is None or status == -signal.SIGXCPU
    return "killed", f"{by}: " + (
        "no end in sight" if endless else f"signal {-status}" if status and status < 0 else output[-1]
    )


def _call(test: Any) -> None:
    """Calls a test with every combination of its parameters, and the library's level where it has such a parameter."""
    given = [mark.args for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    marks = [mark for mark in given if mark[0] != "level"]
    level = {"level": NAME} if len(marks) < len(given) else {}
    for values in product(*(values for _, values in marks)):
        arguments = {}
        for (names, _), value in zip(marks, values, strict=True):
            arguments |= {names: value} if isinstance(names, str) else dict(zip(names, value, strict=True))
        test(**level, **arguments)
