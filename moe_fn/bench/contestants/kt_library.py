"""kt-kernel's module of kernels for this CPU, loaded without its package, whose import needs many others.

Its functions take addresses, and print: what they print is discarded.
"""

import contextlib
import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_fn.bench.contestants.entry import missing

REST_MS = 60.0  # its threads wait actively for 50 ms after a call
_MODULE = "kt_kernel_ext"  # the name that the package uses, too


def _folder() -> Path | None:
    spec = importlib.util.find_spec("kt_kernel")
    folders = () if spec is None else tuple(spec.submodule_search_locations or ())
    return next((Path(folder) for folder in folders), None)


def _loaded(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: expected a Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _detector() -> Any:
    """The package's module that chooses a variant for the CPU."""
    folder = _folder()
    if folder is None:
        raise ImportError("kt_kernel is not installed")
    return _loaded("kt_kernel_cpu_detect", folder / "_cpu_detect.py")


def problem_with_kt() -> str | None:
    """The reason why kt-kernel cannot be loaded, or None."""
    reason, folder = missing("kt_kernel"), _folder()
    if reason is None and (folder is None or not any(folder.glob("*kt_kernel_ext*.so"))):
        return "kt_kernel is installed, but not its modules of kernels"
    return reason


def variant() -> str:
    """The variant for this CPU: "amx", "avx512_bf16", ..., "avx2"."""
    found: str = _detector().detect_cpu_features()
    return found


def extension() -> Any:
    """The module with that variant, loaded once: it registers its types in the process."""
    if _MODULE not in sys.modules:
        with silent():
            sys.modules[_MODULE] = _detector().initialize()[0]
    return sys.modules[_MODULE]


def threads_of(number: int) -> Any:
    """A pool with so many threads, kept until the process ends, since its destructor prints."""
    kt = extension()
    config = kt.WorkerPoolConfig()
    config.subpool_count, config.subpool_numa_map, config.subpool_thread_count = 1, [0], [number]
    with silent():
        pool = kt.CPUInfer(config)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))
    return pool


def addresses(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The addresses of all experts' tensors, for a machine with one node."""
    return [[tensor.data_ptr() for tensor in tensors]]


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Discards what the process writes to its standard output, with C's buffer."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
