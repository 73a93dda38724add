"""What the native ops run where the library is not in place yet, or cannot be: it is put in place, or torch's own products run."""

from typing import Any

from torch import Tensor

from moe_fn.kernels import native, torch_grouped


def grouped_matmul(*args: Any) -> Tensor:
    return _run("grouped_matmul", torch_grouped.grouped_matmul, args)


def grouped_outer(*args: Any) -> Tensor:
    return _run("grouped_outer", torch_grouped.grouped_outer, args)


def _run(name: str, otherwise: Any, args: tuple[Any, ...]) -> Tensor:
    fits = args[0].device.type == "cpu" and args[0].dtype in native.DTYPES
    library = native.active() if fits else None
    out: Tensor = otherwise(*args) if library is None or library.problem else getattr(library.ops, name)(*args)
    return out
