"""The clock of a GPU: replays of CUDA graphs between events, with nothing of the layer left in the L2 cache.

Every input of a contestant is captured as a graph of its own, so the routing changes from turn to turn and no copy into
static buffers is timed or waited for. A contestant that waits for the device (`.item()`, `nonzero`) cannot be captured:
it is found by torch's sync debug mode before a capture is tried, because a capture that broke leaves the allocator in a
worse state, and it is timed call by call, which is what its users pay.
"""

import functools
import gc
from typing import Any

import torch
from torch import Tensor

from moe_fn.bench.clock import Clock, Ready, Run, Timer

LEAST_FLUSH_BYTES = 2**28  # also what keeps the GPU busy while the host launches: 0.1 ms and more


def flush_bytes(cache_bytes: int) -> int:
    """Size of the buffer that pushes everything else out of a cache of so many bytes.

    >>> flush_bytes(50 * 2**20) // 2**20, flush_bytes(126 * 2**20) // 2**20
    (256, 504)
    """
    return max(LEAST_FLUSH_BYTES, 4 * cache_bytes)


def clock_on_cuda(device: torch.device) -> Clock:
    """The clock; its graphs share one pool of memory, which is safe because one replay ends before another begins."""
    if device.index is not None:
        torch.cuda.set_device(device)
    gc.collect()
    torch.cuda.empty_cache()  # what the graphs of the number of tokens before held
    pool, stream, one = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device), torch.zeros(1, device=device)
    _on_stream(stream, one.zero_)
    launch, _ = _capture(pool, stream, one.zero_)  # kept by the clock: a pool without a graph would be given up
    ready = functools.partial(_ready, pool, stream)
    return Clock(time=cold_timer(device), ready=ready, launch=launch)


def cold_timer(device: torch.device) -> Timer:
    """Milliseconds on the GPU of a call that finds nothing of its own in the L2 cache."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return functools.partial(_time, torch.zeros(flush_bytes(cache) // 4, device=device))


def _time(buffer: Tensor, run: Run) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    buffer.zero_()
    buffer.sum()  # a cache full of written lines would have to write them back while the contestant runs
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _ready(pool: Any, stream: torch.cuda.Stream, runs: tuple[Run, ...]) -> Ready:
    for run in runs:
        _on_stream(stream, run)  # as torch asks for before a capture; what tunes itself does it now
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
    """What an error says, without its advice.

    >>> first_line(RuntimeError("CUDA error: operation not permitted when stream is capturing\\nCompile with ..."))
    'CUDA error: operation not permitted when stream is capturing'
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def _capture(pool: Any, stream: torch.cuda.Stream, run: Run) -> tuple[Run, Any]:
    """(replay, what it writes); where the second is dropped, the next graph writes there too."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        outputs = run()
    return graph.replay, outputs


def _why_not_captured(stream: torch.cuda.Stream, run: Run) -> str | None:
    """How the call waits for the device, or None."""
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
    """Calls it on the stream, after what was asked of the current one and before what comes."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
