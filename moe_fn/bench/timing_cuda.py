"""Clock of a GPU: replays of CUDA graphs between events, with a cold L2 cache.

Every input of a contestant is captured as its own graph, so the routing changes from turn to turn without copies into
static buffers. A contestant with host syncs (`.item()`, `nonzero`) cannot be captured: torch's sync debug mode detects
it before a capture, because a failed capture leaves the allocator in a bad state, and it is timed call by call, as its
users run it.
"""

import functools
import gc
from typing import Any

import torch
from torch import Tensor

from moe_fn.bench.clock import Clock, Ready, Run, Timer

LEAST_FLUSH_BYTES = 2**28  # also keeps the GPU busy while the host launches: 0.1 ms and more


def flush_bytes(cache_bytes: int) -> int:
    """Size of a buffer that evicts everything else from a cache of `cache_bytes`.

    >>> flush_bytes(50 * 2**20) // 2**20, flush_bytes(126 * 2**20) // 2**20
    (256, 504)
    """
    return max(LEAST_FLUSH_BYTES, 4 * cache_bytes)


def clock_on_cuda(device: torch.device) -> Clock:
    """The clock. Its graphs share one memory pool, which is safe because each replay ends before the next begins."""
    if device.index is not None:
        torch.cuda.set_device(device)
    gc.collect()
    torch.cuda.empty_cache()  # memory of the graphs of the previous number of tokens
    pool, stream, one = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device), torch.zeros(1, device=device)
    _on_stream(stream, one.zero_)
    launch, _ = _capture(pool, stream, one.zero_)  # kept by the clock: a pool without a graph would be freed
    ready = functools.partial(_ready, pool, stream)
    return Clock(time=cold_timer(device), ready=ready, launch=launch)


def cold_timer(device: torch.device) -> Timer:
    """A timer of milliseconds on the GPU of a call with a cold L2 cache."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return functools.partial(_time, torch.zeros(flush_bytes(cache) // 4, device=device))


def _time(buffer: Tensor, run: Run) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    buffer.zero_()
    buffer.sum()  # reads: dirty cache lines would be written back while the contestant runs
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _ready(pool: Any, stream: torch.cuda.Stream, runs: tuple[Run, ...]) -> Ready:
    for run in runs:
        _on_stream(stream, run)  # warm-up that torch requires before a capture; autotuning runs now
    reason = _why_not_captured(stream, runs[0])
    if reason is None:
        try:
            first, outputs = _capture(pool, stream, runs[0])
            return Ready(
                runs=(first, *(_capture(pool, stream, run)[0] for run in runs[1:])), how="graph", outputs=outputs
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = first_line(error)
            torch.cuda.synchronize()
    return Ready(runs=runs, how="events", reason=reason)


def first_line(error: Exception) -> str:
    """The first line of an error's message.

    >>> first_line(RuntimeError("CUDA error: operation not permitted when stream is capturing\\nCompile with ..."))
    'CUDA error: operation not permitted when stream is capturing'
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def _capture(pool: Any, stream: torch.cuda.Stream, run: Run) -> tuple[Run, Any]:
    """(replay, its outputs); if the outputs are dropped, the next graph reuses their memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        outputs = run()
    return graph.replay, outputs


def _why_not_captured(stream: torch.cuda.Stream, run: Run) -> str | None:
    """The error of the call's host sync, or None."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _on_stream(stream, run)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return first_line(error)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return None


def _on_stream(stream: torch.cuda.Stream, run: Run) -> None:
    """Calls `run` on the stream, ordered after earlier and before later work on the current stream."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
