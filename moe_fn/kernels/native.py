"""The CPU kernels: a C++ library built on first use from the sources beside this file, one for each instruction-set level.

The compiler is the one that torch.compile needs on a CPU anyway, run by torch's own extension builder. The library is kept where torch
keeps extensions, in a folder that nobody else may write into (`moe_fn.kernels.trust`), under a name that holds level, torch version and a
hash of the sources. Without a compiler or such a folder there is a reason instead.
"""

import functools
import hashlib
import logging
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_fn.compiling import constant_while_tracing
from moe_fn.config.quant import quant_of_text
from moe_fn.kernels.trust import only_ours, private_folder

SOURCES = Path(__file__).parent / "cpu"
DTYPES = (torch.float32, torch.bfloat16)

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
# What each level is compiled with, best first. Of CPUs with bfloat16 products Cooper Lake alone lacks VBMI, which decodes fp8;
# "plain" is what the compiler's plain target has (SSE2 on x86-64, NEON on Arm).
LEVELS: dict[str, tuple[str, ...]] = {
    "avx512_bf16": (*_AVX512, "-mavx512bf16", "-mavx512vnni", "-mavx512vbmi"),
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma"),
    "plain": (),
}

_log = logging.getLogger("moe_fn")
_first_use = threading.RLock()  # functools.cache lets threads that find nothing all compute: each would run the compiler


@dataclass(frozen=True)
class Library:
    """The kernels of a level, or why there are none."""

    level: str
    path: Path | None
    problem: str | None

    @property
    def ops(self) -> object:
        """Its ops: routed_experts, grouped_matmul, grouped_outer, read, gemm."""
        return getattr(torch.ops, f"moe_fn_{self.level}")


@dataclass(frozen=True)
class Probes:
    """What the benchmark measures the machine with."""

    library: Library

    def empty(self, num_bytes: int) -> Tensor:
        """Memory to read, in huge pages where there are any."""
        out: Tensor = self.library.ops.empty_like(torch.empty(num_bytes, dtype=torch.uint8))  # type: ignore[attr-defined]
        return out

    def read(self, tensor: Tensor, first_byte: int, num_bytes: int) -> int:
        """Read the bytes of a tensor with all threads, two streams each; a checksum."""
        return int(self.library.ops.read(tensor, first_byte, num_bytes))  # type: ignore[attr-defined]

    def gemm(self, dtype: torch.dtype, repeats: int) -> float:
        """GFLOP/s of all threads on the inner loop of the kernels, out of cache."""
        return float(self.library.ops.gemm(dtype == torch.bfloat16, repeats))  # type: ignore[attr-defined]


@functools.cache
def best_level() -> str:
    """The best level that this CPU runs."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "plain"
    if torch.cpu._is_avx512_supported():
        more = torch.cpu.get_capabilities()
        return "avx512_bf16" if all(more.get(f"avx512_{name}") for name in ("bf16", "vnni", "vbmi")) else "avx512"
    return "avx2" if torch.cpu._is_avx2_supported() else "plain"


def library(level: str) -> Library:
    """The library of a level, loaded; built if it is not there yet, or if somebody else may have written it.

    Threads that come first together build it once.
    """
    with _first_use:
        return _library(level)


@functools.cache
def _library(level: str) -> Library:
    name = f"moe_fn_{level}_{_fingerprint(level)}"
    try:
        path = _folder() / f"{name}.so"
        if not only_ours(path):
            _build(level, name, path)
        torch.ops.load_library(path)
    except Exception as error:  # whatever a compiler, a loader or a full disk has to say: torch's own products are the answer to all
        return Library(level, None, f"{type(error).__name__}: {_short(error)}")
    return Library(level, path, None)


def active() -> Library:
    """The library of this CPU's best level, in place as the CPU kernels of moe_fn's ops."""
    with _first_use:
        return _active()


@functools.cache
def _active() -> Library:
    found = library(best_level())
    if found.problem is None:
        found.ops.install()  # type: ignore[attr-defined]
    else:
        _log.warning("moe_fn: no native CPU kernels (%s); torch's own products run instead", found.problem)
    return found


def problem(device: str, dtype: torch.dtype) -> str | None:
    """Why the kernels do not run for this device and dtype; None if they do. Builds them on first use."""
    if device != "cpu":
        return f"the native kernels run on the CPU, not on {device}"
    if dtype not in DTYPES:
        return f"the native kernels compute in float32 and bfloat16, not in {dtype}"
    return active().problem


@constant_while_tracing
def quant_problem(quant: str, hidden: int, intermediate: int, device: str) -> str | None:
    """Why the kernels do not compute quantised experts (`QuantConfig.text`); None if they do. A decoder takes 32 bits of codes at once."""
    config = quant_of_text(quant)
    tile, together, a = config.tile[1], 4 * config.per_byte, config.activations
    if tile is not None and tile % together and tile < max(hidden, intermediate):
        return f"quant: a scale of {tile} inputs; the native kernels take multiples of {together}"
    if a is not None and (a.scheme, a.granularity, a.static) != ("int8", "token", False):
        scale = "static" if a.static else "computed"
        return f"quant: {a.scheme} activations, {scale} scale of a {a.granularity}; the native kernels take int8, computed for a token"
    return None


def run(name: str, otherwise: Callable[..., Any], like: Tensor, *rest: Any) -> Any:
    """The library's op on (like, *rest), or where it cannot run for such a tensor, `otherwise`.

    What moe_fn's native ops run until the library is in their place, which the first call sees to.
    """
    function = otherwise if problem(like.device.type, like.dtype) else getattr(active().ops, name)
    return function(like, *rest)


def probes() -> Probes | None:
    """The benchmark's probes, where there is a library."""
    found = active()
    return Probes(found) if found.problem is None else None


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy of a CPU tensor in huge pages, where the system gives them: they read 10 to 20 % faster on a virtual machine."""
    copy: Tensor = active().ops.empty_like(tensor)  # type: ignore[attr-defined]
    return copy.copy_(tensor)


def _fingerprint(level: str) -> str:
    text = [torch.__version__, level, *LEVELS[level]]
    text += [path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp")]
    return hashlib.sha256("\0".join(text).encode()).hexdigest()[:16]


def _folder() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    return private_folder(Path(get_default_build_root()) / "moe_fn")


def _build(level: str, name: str, path: Path) -> None:
    """Build in a folder of our own and move the result.

    Not cpp_extension.load: it wants a ninja on the PATH, and its lock file, left by a killed process, makes the next one wait forever.
    """
    from setuptools import Distribution, Extension
    from torch.utils import cpp_extension

    _log.warning("moe_fn: building the CPU kernels (%s), once, into %s", level, path)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        extension = Extension(
            name,
            [str(SOURCES / name) for name in ("kernels.cpp", "quantised.cpp", "backward.cpp", "binding.cpp")],
            include_dirs=cpp_extension.include_paths(),
            library_dirs=cpp_extension.library_paths(),
            libraries=["c10", "torch", "torch_cpu"],
            extra_compile_args=["-O3", "-std=c++20", "-fopenmp", f"-DNAME=moe_fn_{level}", *LEVELS[level]],
            extra_link_args=["-fopenmp"],
            language="c++",
        )
        command = cpp_extension.BuildExtension(Distribution({"ext_modules": [extension]}), use_ninja=False, no_python_abi_suffix=True)
        command.build_lib, command.build_temp = folder, str(Path(folder) / "objects")
        command.ensure_finalized()
        command.run()
        built = Path(folder) / f"{name}.so"
        built.chmod(0o700)  # whatever the umask: what others may write is not loaded
        os.replace(built, path)
    _log.info("moe_fn: built in %.0f s", time.perf_counter() - start)


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wanted = [line for line in lines if "error" in line.lower()] or lines
    return (wanted[0] if wanted else "no message")[:300]
