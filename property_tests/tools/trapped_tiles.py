"""Runs AMX's tile instructions on a CPU without AMX: a handler of SIGILL executes them (trapped_tiles.cpp)."""

import contextlib
import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.utils import cpp_extension

KINDS = ("configurations", "releases", "loads", "stores", "zeros", "products")


@dataclass(frozen=True)
class Trapped:
    """What the instructions did since the handler was installed."""

    handler: ctypes.CDLL

    @property
    def violation(self) -> str:
        """The first instruction that a CPU would have refused, and why; or nothing."""
        return bytes(self.handler.tiles_violation()).decode()

    @property
    def configured(self) -> int:
        """The threads with a configuration that is not released."""
        return int(self.handler.tiles_configured())

    def count(self, kind: str) -> int:
        """How many instructions of a kind have run."""
        return int(self.handler.tiles_count(KINDS.index(kind)))


@contextlib.contextmanager
def trapped_tiles() -> Iterator[Trapped]:
    """Executes tile instructions of all threads in the block."""
    handler = _handler()
    handler.tiles_clear()
    handler.tiles_install()
    try:
        yield Trapped(handler)
    finally:
        handler.tiles_remove()


def tiles_in_use() -> bool:
    """Whether the calling thread of a CPU with AMX has a configuration of tiles."""
    return bool(_handler().tiles_in_use())


@functools.cache
def _handler() -> ctypes.CDLL:
    source = Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory() as folder:  # a loaded library needs no file
        path = Path(folder) / "trapped_tiles.so"
        flags = ["-O2", "-std=c++20", "-mfma", "-shared", "-fPIC"]
        subprocess.run([*cpp_extension.get_cxx_compiler().split(), *flags, str(source), "-o", str(path)], check=True)
        handler = ctypes.CDLL(str(path))
    handler.tiles_violation.restype, handler.tiles_count.restype = ctypes.c_char_p, ctypes.c_long
    return handler
