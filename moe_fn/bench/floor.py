"""Floor of a layer's time: the time to read its weights or to compute its products on this machine.

    floor(T) = max(distinct experts x bytes / read bandwidth,  T k x 2 m H I / GEMM rate)

m is the number of matrices: 3, or 2 if not gated. Bytes of an expert are those of its m H I weights or, if quantized,
of its codes and scales. The GEMM rate is that of the dtype of x; where inputs are rounded to int8, that of int8
products if it is higher.

Both rates are measured in the same run as the contestants: on a shared machine bandwidth changes with its load.
"""

import contextlib
import time
from collections.abc import Callable

import torch
from torch import Tensor

from moe_fn.bench.models import matrices
from moe_fn.bench.quants import expert_bytes
from moe_fn.bench.reader import BUFFER_BYTES, Reader
from moe_fn.config import MoEConfig, QuantConfig
from moe_fn.kernels.native import library as native

LEAST_BUFFER_BYTES = 2**26
_SIZE = 1536  # size of the square matrices whose product is timed
_INT8_SIZE = 3072  # torch._int_mm packs in every call: at 1536 it is no faster than bf16, at 2048 1.5 times


def reader_of_device(device: torch.device, num_bytes: int) -> Reader:
    """The fastest way to read memory: the native loop on a CPU, else torch.sum.

    num_bytes: the most that a turn reads.
    """
    if device.type == "cuda":
        from moe_fn.bench.floor_cuda import reader_on_cuda

        return reader_on_cuda(device)
    size = min(BUFFER_BYTES, max(LEAST_BUFFER_BYTES, 16 * num_bytes)) // 64 * 64
    probes = native.probes()
    if probes is None:
        return Reader(name="torch.sum", buffer=torch.ones(size // 4, device=device), read=_sum)
    return Reader(name="native", buffer=probes.empty(size).fill_(1), read=probes.read)


def gemm_rates(dtype: torch.dtype, device: torch.device, quant: QuantConfig | None = None) -> dict[str, float]:
    """GFLOP/s by each way to measure it; the GEMM rate is the largest."""
    if device.type == "cuda":
        from moe_fn.bench.floor_cuda import gemm_rates_on_cuda

        return gemm_rates_on_cuda(dtype, device)
    rates = {"torch.mm": _mm_rate(dtype, device)}
    probes = native.probes()
    if probes is not None:
        with contextlib.suppress(ValueError, RuntimeError):  # no kernel for this dtype
            rates["native"] = _probe_rate(probes, dtype)
    if quant is not None and quant.activations is not None and quant.activations.scheme == "int8":
        rates["torch._int_mm"] = _int8_rate(device)
    return rates


def read_bytes(config: MoEConfig, distinct: float, dtype: torch.dtype, backward: bool) -> float:
    """Bytes of weights to move: those of `distinct` experts; with gradients twice those and all experts' gradients."""
    return (2 * distinct + config.num_experts if backward else distinct) * expert_bytes(config, dtype)


def product_flops(config: MoEConfig, tokens: int, backward: bool) -> float:
    """Operations of the experts' products; the backward pass has two products for each of the forward pass."""
    forward = tokens * config.top_k * 2 * matrices(config) * config.hidden_size * config.intermediate_size
    return 3.0 * forward if backward else float(forward)


def floor_ms(read_ms: float, flops: float, gflops: float) -> float:
    """Milliseconds: reading takes read_ms, and flops operations go at gflops GFLOP/s; the longer of the two.

    >>> floor_ms(2.0, 9e9, 1000.0)
    9.0
    """
    return max(read_ms, flops / gflops / 1e6)


def _sum(buffer: Tensor, first_byte: int, num_bytes: int) -> Tensor:
    return buffer[first_byte // 4 : (first_byte + num_bytes) // 4].sum()


def _mm_rate(dtype: torch.dtype, device: torch.device) -> float:
    return _rate_of(torch.mm, torch.ones(_SIZE, _SIZE, dtype=dtype, device=device))


def _int8_rate(device: torch.device) -> float:
    return _rate_of(torch._int_mm, torch.ones(_INT8_SIZE, _INT8_SIZE, dtype=torch.int8, device=device))


def _rate_of(product: Callable[[Tensor, Tensor], Tensor], a: Tensor) -> float:
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        product(a, a)
        best = min(best, time.perf_counter() - start)
    return float(2 * len(a) ** 3 / best / 1e9)


def _probe_rate(probes: native.Probes, dtype: torch.dtype) -> float:
    repeats = 64
    while True:  # until a call is long enough for the clock
        start = time.perf_counter()
        rate = probes.gemm(dtype, repeats)
        if time.perf_counter() - start > 0.02 or repeats > 10**7:
            return max(rate, probes.gemm(dtype, repeats), probes.gemm(dtype, repeats))
        repeats *= 4
