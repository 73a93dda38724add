"""Sum of the expert loads of the last steps: a window that is a value."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fn.checks import INTEGERS, check_kind


@dataclass(frozen=True, kw_only=True)
class LoadWindow:
    """The loads of the last W steps. A pytree, so it goes through a compiled step as an argument and a result."""

    ring: Tensor  # [W, ..., E] int64 or int32: the load of step s is ring[s mod W]; zeros for steps before the first
    step: Tensor  # [] int64: how many loads were pushed


torch.export.register_dataclass(LoadWindow, serialized_type_name="moe_fn.LoadWindow")


def load_window(
    size: int, *shape: int, dtype: torch.dtype = torch.int64, device: torch.device | str = "cpu"
) -> LoadWindow:
    """An empty window of `size` steps for loads of this shape: (E,) or (layers, E).

    Raises ValueError for a size below 1 and for a dtype other than int32 and int64.

    >>> total(load_window(3, 2)).tolist()
    [0, 0]
    """
    if size < 1 or dtype not in (torch.int32, torch.int64):
        raise ValueError(f"load_window: size={size}, dtype={dtype}; expected size >= 1 and int32 or int64")
    ring = torch.zeros(size, *shape, dtype=dtype, device=device)
    return LoadWindow(ring=ring, step=torch.zeros((), dtype=torch.int64, device=device))


def push(window: LoadWindow, load: Tensor) -> LoadWindow:
    """The window one step later: load [..., E] replaces the oldest. Does not read `step` on the host.

    Raises ValueError for a load of another shape or without an integer dtype.

    Laws
        A window is the sum of the last loads.

    >>> window = load_window(2, 1)
    >>> for load in (1, 2, 4):
    ...     window = push(window, torch.tensor([load]))
    >>> total(window).tolist(), window.step.item()
    ([6], 3)
    """
    check_kind("push", "window", window, LoadWindow)
    check_kind("push", "load", load, Tensor)
    if load.shape != window.ring.shape[1:] or load.dtype not in INTEGERS:
        raise ValueError(
            f"push: load is {load.dtype} {list(load.shape)}; expected integers {list(window.ring.shape[1:])}"
        )
    size = window.ring.shape[0]
    newest = torch.arange(size, device=window.step.device) == torch.remainder(window.step, size)
    place = newest.view(size, *(1 for _ in load.shape))
    return LoadWindow(ring=torch.where(place, load.to(window.ring.dtype), window.ring), step=window.step + 1)


def total(window: LoadWindow) -> Tensor:
    """The sum over the window: [..., E] int64.

    >>> total(push(load_window(2, 2), torch.tensor([3, 4]))).tolist()
    [3, 4]
    """
    check_kind("total", "window", window, LoadWindow)
    return window.ring.sum(0, dtype=torch.int64)
