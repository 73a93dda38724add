"""Activation memory of a training step, and SonicMoE's formula (arXiv 2512.14080) for comparison."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fn.config import MoEConfig


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Activation memory in bytes.

    kept: x and the tensors saved for the backward pass; peak: the peak of both passes besides weights and input.
    """

    kept: int
    peak: int


def sonic_bytes(config: MoEConfig, tokens: int, itemsize: int) -> int:
    """Bytes that SonicMoE keeps: x and the pre-activations of gate and up, 2 (T H + 2 T k I) bytes in bf16.

    >>> config = MoEConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=32)
    >>> sonic_bytes(config, 10, 2) == 2 * (10 * 64 + 2 * 10 * 2 * 32)
    True
    """
    return itemsize * (tokens * config.hidden_size + 2 * tokens * config.top_k * config.intermediate_size)


def memory_of_step(x: Tensor, grad: Tensor, leaves: tuple[Tensor, ...], forward: Callable[[], Tensor]) -> Memory | None:
    """Activation memory of a forward and backward pass, after a warm-up; None on a CPU, where torch has no count."""
    if x.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = forward()
    kept = torch.cuda.memory_allocated() - before - y.numel() * y.itemsize + x.numel() * x.itemsize
    torch.autograd.grad(y, (x, *leaves), grad)
    torch.cuda.synchronize()
    return Memory(kept=max(0, kept), peak=torch.cuda.max_memory_allocated() - before)
