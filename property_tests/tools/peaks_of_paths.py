"""Measures the peak memory of every path of the layer in one process and compares it with its formula.

Run by `test_peaks` and `make soak`:

PYTHONPATH=property_tests python -m tools.peaks_of_paths THREADS EXPERTS,TOP_K,HIDDEN,INTERMEDIATE,TOKENS [quick]
"""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import moe_fn
from moe_fn import ActivationQuantConfig, MoEConfig, MoEWeights, QuantConfig
from moe_fn.bench.peaks import forward_peak, prepare_peak, step_peak

INT8 = ActivationQuantConfig(scheme="int8", granularity="token")
FORWARD: dict[str, dict[str, Any]] = {
    "native": {"backend": "native"},
    "native, opaque chunks": {"backend": "native", "chunk_tokens": 512, "opaque": True},
    "native, chunks": {"backend": "native", "chunk_tokens": 512},
    "stages": {"backend": "torch"},
    "int8": {"backend": "native", "quant": QuantConfig(scheme="int8", granularity="channel")},
    "int8, inputs too": {
        "backend": "native",
        "quant": QuantConfig(scheme="int8", granularity="channel", activations=INT8),
    },
    "int4 in groups": {"backend": "native", "quant": QuantConfig(scheme="int4", granularity="group", group_size=32)},
    "mxfp4": {"backend": "native", "quant": QuantConfig(scheme="mxfp4", granularity="group", group_size=32)},
}
STEP: dict[str, dict[str, Any]] = {
    "native, step": {"backend": "native"},
    "native, step, recompute": {"backend": "native", "recompute": True},
    "native, step, chunks": {"backend": "native", "chunk_tokens": 512},
    "native, step, opaque chunks": {"backend": "native", "chunk_tokens": 512, "opaque": True},
    "stages, step": {"backend": "torch"},
}
# Paths that the tests measure; the others take long or are similar.
_STEPS = ("native, step", "native, step, recompute", "native, step, chunks", "stages, step")
QUICK = {
    torch.float32: ("native", "native, chunks", "stages", "int8, inputs too", *_STEPS),
    torch.bfloat16: ("native", "int4 in groups", "native, step"),
}


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def peak(function: Callable[[], object]) -> int:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, result = status("VmRSS"), function()
    del result  # alive until here
    return status("VmHWM") - before


def forward(
    config: MoEConfig, weights: MoEWeights, x: torch.Tensor, logits: torch.Tensor, gradient: torch.Tensor
) -> object:
    with torch.no_grad():
        return moe_fn.moe_forward(config, weights, x, logits)


def step(
    config: MoEConfig, weights: MoEWeights, x: torch.Tensor, logits: torch.Tensor, gradient: torch.Tensor
) -> object:
    leaves = [t.requires_grad_() for t in (x, logits, weights.gate_up, weights.down)]
    return torch.autograd.grad(moe_fn.moe_forward(config, weights, x, logits), leaves, gradient)


def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape).mul_(shape[-1] ** -0.5).to(dtype)


def layer(
    options: dict[str, Any], dtype: torch.dtype, experts: int, top_k: int, hidden: int, inner: int
) -> tuple[MoEConfig, MoEWeights]:
    config = MoEConfig(num_experts=experts, top_k=top_k, hidden_size=hidden, intermediate_size=inner, **options)
    weights = MoEWeights(gate_up=random(dtype, experts, 2 * inner, hidden), down=random(dtype, experts, hidden, inner))
    return (config, weights) if config.quant is None else moe_fn.quantize_weights(config, weights)


def report(name: str, dtype: torch.dtype, measured: int, said: int) -> bool:
    """Prints both and returns whether they differ by more than 10 %."""
    words = str(dtype).removeprefix("torch.")
    print(
        f"{name:26} {words:9} {measured / 1e6:8.1f} MB, by formula {said / 1e6:8.1f} MB: {measured / said:.3f}",
        flush=True,
    )
    return not 0.9 <= measured / said <= 1.1


def main() -> int:
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: freed memory is returned to the system
    threads, quick = int(sys.argv[1]), "quick" in sys.argv
    experts, top_k, hidden, inner, tokens = map(int, sys.argv[2].split(","))
    torch.set_num_threads(threads)
    off = 0
    for dtype in (torch.float32, torch.bfloat16):
        for name, options in {**FORWARD, **STEP}.items():
            if quick and name not in QUICK[dtype]:
                continue
            run, formula = (step, step_peak) if name in STEP else (forward, forward_peak)
            config, weights = layer(options, dtype, experts, top_k, hidden, inner)
            args = random(dtype, tokens, hidden), torch.randn(tokens, experts), random(dtype, tokens, hidden)
            run(config, weights, *(t[:64].detach().clone() for t in args))
            measured = peak(lambda run=run, config=config, weights=weights, args=args: run(config, weights, *args))  # type: ignore[misc]
            off += report(name, dtype, measured, formula(config, tokens, dtype, threads))
        config, weights = layer({"backend": "native"}, dtype, 4 * experts, top_k, hidden, inner)
        measured = peak(lambda config=config, weights=weights: moe_fn.prepare_weights(config, weights))  # type: ignore[misc]
        off += report("prepare_weights", dtype, measured, prepare_peak(config, dtype))
    return off


if __name__ == "__main__":
    sys.exit(main())
