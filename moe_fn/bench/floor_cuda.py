"""Rates of a GPU for the floor: the fastest read of memory, and torch.mm."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from moe_fn.bench.reader import BUFFER_BYTES, Reader

TRIES = 5
_ROW = 8192  # values that one program of a reduction by rows reads: 32 KB

Reduction = Callable[[Tensor], Tensor]


def reader_on_cuda(device: torch.device) -> Reader:
    """The fastest of a few reductions of a gigabyte, or of a quarter of the free memory.

    A turn reads the whole buffer, and its time is scaled to the requested bytes: when a GPU reads the 75 MB of eight
    experts, half of the time is launch and tail, which would make the floor too high.
    """
    size = min(BUFFER_BYTES, torch.cuda.mem_get_info(device)[0] // 4) // (4 * _ROW) * (4 * _ROW)
    buffer = torch.ones(size // 4, device=device)
    times: dict[str, float] = {}
    ways = _ways(device)
    for name, way in ways.items():
        try:
            times[name] = best_ms(lambda way=way: way(buffer))  # type: ignore[misc]
        except Exception:  # torch.compile without a compiler: use the other ways
            continue
    best = min(times, key=lambda name: times[name])
    return Reader(name=best, buffer=buffer, read=lambda buffer, first, count: ways[best](buffer), whole=True)


def gemm_rates_on_cuda(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """GFLOP/s of torch.mm with the second matrix as it is or transposed.

    With random values, since ones draw less power and run at a higher clock.
    """
    size = gemm_size(torch.cuda.mem_get_info(device)[0], dtype.itemsize)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.empty(size, size, dtype=dtype, device=device).normal_(generator=generator) for _ in range(2))
    out = torch.empty_like(a)
    seconds = {
        f"torch.mm {name}, {size}^3": best_ms(lambda right=right: torch.mm(a, right, out=out)) / 1e3  # type: ignore[misc]
        for name, right in (("NN", b), ("NT", b.T))
    }
    return {name: 2 * size**3 / value / 1e9 for name, value in seconds.items()}


def gemm_size(free_bytes: int, itemsize: int) -> int:
    """The size of three square matrices that fit into half of the memory: 8192, halved as often as needed.

    >>> gemm_size(80 * 10**9, 2), gemm_size(10**9, 4)
    (8192, 4096)
    """
    size = 8192
    while size > 512 and 6 * size * size * itemsize > free_bytes:
        size //= 2
    return size


def best_ms(run: Callable[[], object]) -> float:
    """Milliseconds of the fastest of TRIES calls, one after the other."""
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(TRIES + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    events[-1].synchronize()
    return float(min(start.elapsed_time(end) for start, end in itertools.pairwise(events)))


def _ways(device: torch.device) -> dict[str, Reduction]:
    ones = torch.ones(_ROW * 2, dtype=torch.bfloat16, device=device)

    def by_rows(buffer: Tensor) -> Tensor:
        return buffer.view(-1, _ROW).sum(1)

    return {
        "torch.sum": torch.sum,
        "torch.sum by rows": by_rows,
        "torch.sum by rows, compiled": torch.compile(by_rows, dynamic=False),
        "torch.amax": torch.amax,
        "torch.mv": lambda buffer: torch.mv(buffer.view(torch.bfloat16).view(-1, _ROW * 2), ones),
    }
