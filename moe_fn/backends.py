"""Back-ends that compute the experts: which are available, and which one a call uses. There is no silent fallback."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.kernels.native import library
from moe_fn.kernels.native import support as native
from moe_fn.kernels.torch import support as plain
from moe_fn.kernels.triton import support as gpu
from moe_fn.torch_compat import constant_while_tracing


@dataclass(frozen=True, kw_only=True)
class BackendInfo:
    """A back-end: one row of `backends()`."""

    name: str
    available: bool
    devices: tuple[str, ...]
    chosen_by_auto_on: tuple[str, ...]
    reason: str


def backends() -> tuple[BackendInfo, ...]:
    """Returns the back-ends of `MoEConfig.backend`: whether each is available here, where "auto" chooses it, and why.

    Builds the native kernels if this machine has not built them yet.

    >>> [info.name for info in backends()]
    ['torch', 'native', 'triton']
    """
    problem, found = native.problem("cpu", torch.float32), library.active()
    chosen = problem is None and found.level != "plain"
    on_gpu, on_cpu = (gpu.problem(device, torch.float32) for device in ("cuda", "cpu"))
    gpu_there = on_gpu is None and torch.cuda.is_available()
    return (
        BackendInfo(
            name="torch",
            available=True,
            devices=("cpu", "cuda"),
            chosen_by_auto_on=tuple(
                device for device, taken in (("cpu", chosen), ("cuda", on_gpu is None)) if not taken
            ),
            reason=(
                f"plain torch {torch.__version__}: one product per expert on the CPU, fixed blocks of rows on "
                "other devices"
            ),
        ),
        BackendInfo(
            name="native",
            available=problem is None,
            devices=("cpu",),
            chosen_by_auto_on=("cpu",) if chosen else (),
            reason=problem
            or f"C++ kernels for float32, bfloat16 and float16, instruction-set level {found.level}, in {found.path}",
        ),
        BackendInfo(
            name="triton",
            available=gpu_there or on_cpu is None,
            devices=("cuda",) if on_cpu else ("cuda", "cpu"),
            chosen_by_auto_on=() if on_gpu else ("cuda",),
            reason=_of_triton(on_gpu, on_cpu, gpu_there),
        ),
    )


def _of_triton(on_gpu: str | None, on_cpu: str | None, gpu_there: bool) -> str:
    if on_gpu is not None:
        return on_gpu
    if gpu_there:
        return "Triton kernels for float32, bfloat16 and float16, compiled on first use"
    return (
        "no CUDA or ROCm device here"
        if on_cpu
        else "no CUDA or ROCm device here; Triton's interpreter runs the kernels, for tests"
    )


# A constant for torch.compile: the choice is made while tracing, and the graph holds the ops of one back-end.
@constant_while_tracing
def _choose(backend: str, device: str, dtype: torch.dtype, invariant: bool) -> tuple[str, str | None]:
    """Returns (the back-end of a call, the reason why it cannot run or None)."""
    if backend == "triton" or (backend == "auto" and device != "cpu"):
        problem = gpu.problem(device, dtype)
        if problem is None or backend == "triton":
            return "triton", problem
    elif backend != "torch":
        problem = native.problem(device, dtype)
        if backend == "native" or (problem is None and library.best_level() != "plain"):
            return "native", problem
    return "torch", plain.problem(device, dtype, invariant)


def runs(backend: str, config: MoEConfig, x: Tensor) -> bool:
    """Whether a call uses this back-end, and it supports the device and dtype of x; never raises."""
    return _choose(config.backend, x.device.type, x.dtype, config.batch_invariant) == (backend, None)


def backend_of(config: MoEConfig, x: Tensor) -> str:
    """Returns the back-end of a call: the one that the config names, or that "auto" chooses by device and dtype of x.

    Raises ValueError if the named back-end cannot run; it is never replaced silently.
    """
    name: str
    name, problem = _choose(config.backend, x.device.type, x.dtype, config.batch_invariant)
    if problem is not None:
        raise ValueError(f"MoEConfig.backend={config.backend!r}: {problem}")
    return name
