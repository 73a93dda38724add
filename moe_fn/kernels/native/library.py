"""Builds and loads the C++ kernels for CPUs: one library for each instruction-set level, compiled on first use from
`sources/`.

torch's extension builder runs the compiler that torch.compile also needs on a CPU. The library is stored in torch's
directory for extensions, which must be writable only by this user (`native.trust`). Its name has the level, a hash of
the sources (also of the generated header, `native.generated`) and of everything else that it depends on, and a digest
of its contents (`native.building`). Without
sources, a compiler or such a directory `Library.problem` has the reason.
"""

import contextlib
import functools
import hashlib
import logging
import os
import platform
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_fn.kernels.native import generated
from moe_fn.kernels.native.building import library_file
from moe_fn.kernels.native.trust import private_folder, user
from moe_fn.torch_compat import cpu_has, may_use_tiles

SOURCES = Path(__file__).parent / "sources"
UNITS = ("backward", "kernels", "lora", "quantized", "router", "binding")  # the translation units of `sources/`

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
_AVX512_BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vnni", "-mavx512vbmi")
# Compiler flags of each level, best first. VBMI decodes fp8; of the CPUs with bfloat16 products only Cooper Lake lacks
# it. "plain" is the compiler's default target (SSE2 on x86-64, NEON on Arm).
LEVELS: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512_bf16": _AVX512_BF16,
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),  # every CPU with AVX2 has F16C
    "plain": (),
}
# A level for tests, on every machine: the sources of "amx" with the tile instructions as plain loops (emulated_amx.h).
EMULATED_AMX = "amx_emulated"
# -g0: Python's default flags add debug symbols, which take half of the compile time and nine tenths of the file.
FLAGS = ("-O3", "-std=c++20", "-fopenmp", "-g0")

_log = logging.getLogger("moe_fn")
# With functools.cache alone, threads that call at the same time would each run the compiler.
_first_use = threading.RLock()


@dataclass(frozen=True)
class Library:
    """The kernels of a level, or the reason (`problem`) why there are none."""

    level: str
    path: Path | None
    problem: str | None

    @property
    def ops(self) -> object:
        """Its ops: routed_experts, grouped_matmul, grouped_outer, route_top_k, read, gemm."""
        return getattr(torch.ops, f"moe_fn_{self.level}")


@dataclass(frozen=True)
class Probes:
    """Microbenchmarks of the machine for the benchmark."""

    library: Library

    def empty(self, num_bytes: int) -> Tensor:
        """An uninitialized uint8 tensor, in huge pages if available."""
        out: Tensor = self.library.ops.empty_like(torch.empty(num_bytes, dtype=torch.uint8))  # type: ignore[attr-defined]
        return out

    def read(self, tensor: Tensor, first_byte: int, num_bytes: int) -> int:
        """Reads the bytes of a tensor with all threads, two streams each. Returns a checksum."""
        return int(self.library.ops.read(tensor, first_byte, num_bytes))  # type: ignore[attr-defined]

    def gemm(self, dtype: torch.dtype, repeats: int) -> float:
        """GFLOP/s of all threads in the kernels' inner loop, with operands in cache."""
        return float(self.library.ops.gemm(torch.empty(0, dtype=dtype), repeats))  # type: ignore[attr-defined]


@functools.cache
def best_level() -> str:
    """The best level that this CPU and the system support."""
    level = _best_without_amx()
    return "amx" if level == "avx512_bf16" and may_use_tiles() else level


def _best_without_amx() -> str:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "plain"
    if cpu_has("avx512"):
        more = torch.cpu.get_capabilities()
        return "avx512_bf16" if all(more.get(f"avx512_{name}") for name in ("bf16", "vnni", "vbmi")) else "avx512"
    return "avx2" if cpu_has("avx2") else "plain"


def flags_of(level: str) -> tuple[str, ...]:
    """A level's compiler flags. The emulated level has those of the best level without tiles."""
    if level == EMULATED_AMX:
        return (*LEVELS[_best_without_amx()], "-DMOE_FN_EMULATED_AMX")
    return LEVELS[level]


def library(level: str) -> Library:
    """The loaded library of a level. It is built if it is missing, damaged, or another user could have written it.

    Threads that call at the same time build it once.
    """
    with _first_use:
        return _library(level)


@functools.cache
def _library(level: str) -> Library:
    try:
        name = f"moe_fn_{level}_{_fingerprint(level)}"
        path = library_file(_folder(), name, lambda to: _build(level, name, to))
        torch.ops.load_library(path)
    except Exception as error:  # any error of the compiler, the loader or the file system: torch's products run instead
        return Library(level, None, f"{type(error).__name__}: {_short(error)}")
    return Library(level, path, None)


def active() -> Library:
    """The library of this CPU's best level, installed as the CPU kernels of moe_fn's ops."""
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


def probes() -> Probes | None:
    """The benchmark's probes; None without a library."""
    found = active()
    return Probes(found) if found.problem is None else None


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy of a CPU tensor in huge pages if the system has them: reads are 10 to 20 % faster on a virtual machine."""
    copy: Tensor = active().ops.empty_like(tensor)  # type: ignore[attr-defined]
    return copy.copy_(tensor)


def _fingerprint(level: str) -> str:
    if not SOURCES.is_dir():
        raise FileNotFoundError(
            f"no C++ sources at {SOURCES}; expected a directory (zip files and most frozen applications have none)"
        )
    libc = "".join(platform.libc_ver())  # machines and containers may share a folder
    text = [torch.__version__, sys.platform, platform.machine(), libc, level, *flags_of(level), *FLAGS]
    text += [path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp")]
    text.append(generated.header())
    return hashlib.sha256("\0".join(text).encode()).hexdigest()[:16]


def _folder() -> Path:
    """torch's directory for extensions: TORCH_EXTENSIONS_DIR, or a directory in the user's cache.

    An empty or relative XDG_CACHE_HOME is ignored, as its specification requires: torch takes it relative to the
    working directory, which may have files of other users.
    """
    from torch import _appdirs
    from torch.utils import cpp_extension

    try:
        folder = Path(cpp_extension._get_build_directory("moe_fn", verbose=False))  # makes it
    except OSError as error:
        raise PermissionError(
            f"{user()} may not create or enter {error.filename} ({error.strerror}); expected a directory of this user "
            "in TORCH_EXTENSIONS_DIR"
        ) from error
    usual = Path(cpp_extension.get_default_build_root())
    if folder.is_relative_to(usual) and not os.path.isabs(_appdirs.user_cache_dir("torch_extensions")):
        with contextlib.suppress(OSError):  # they are not empty
            for made in (folder, *folder.parents[: len(folder.relative_to(usual).parts)]):
                made.rmdir()
        folder = Path.home() / ".cache" / "torch_extensions" / folder.relative_to(usual)
    if not folder.is_absolute():
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise ValueError(
            f"torch's directory for extensions is {str(folder)!r}; expected an absolute path (TORCH_EXTENSIONS_DIR, "
            "HOME)"
        )
    return private_folder(folder)


def _build(level: str, name: str, path: Path) -> None:
    """Compiles a level's library to `path`, <name>.so in an empty directory.

    cpp_extension.load is not used: it needs ninja on the PATH, and a lock file left by a killed process blocks the next
    one forever.
    """
    from setuptools import Distribution, Extension
    from torch.utils import cpp_extension

    _log.warning("moe_fn: building the CPU kernels (%s), once, into %s", level, path.parent.parent)
    start = time.perf_counter()
    (path.parent / generated.NAME).write_text(generated.header())
    extension = Extension(
        name,
        [str(SOURCES / f"{unit}.cpp") for unit in UNITS],
        include_dirs=[str(path.parent), *cpp_extension.include_paths()],
        library_dirs=cpp_extension.library_paths(),
        libraries=["c10", "torch", "torch_cpu"],
        extra_compile_args=[*FLAGS, f"-DNAME=moe_fn_{level}", *flags_of(level)],
        extra_link_args=["-fopenmp"],
        language="c++",
    )
    command = cpp_extension.BuildExtension(
        Distribution({"ext_modules": [extension]}), use_ninja=False, no_python_abi_suffix=True
    )
    command.build_lib, command.build_temp = str(path.parent), str(path.parent / "objects")
    command.ensure_finalized()
    command.run()
    _log.info("moe_fn: built in %.0f s", time.perf_counter() - start)


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wanted = [line for line in lines if "error" in line.lower()] or lines
    return (wanted[0] if wanted else "no message")[:300]
