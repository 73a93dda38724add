"""Checks that no way of calling the layer leaks memory: each is repeated, and resident memory must not grow.

Run by `make soak`:

PYTHONPATH=property_tests python -m tools.soak [--times 1000] [--only forward,compile]

Torch's own caches grow a little with each compile and export. A plain network of torch is measured in the same way, and
the layer may leave no more than that and SLACK. Guards are freed explicitly: in torch 2.13
(`CheckFunctionManager.id_ref`) a weakref.finalize keeps all guards of a compile alive as long as any function, class or
config that they compare, even after torch._dynamo.reset(); 1.0 MB a compile of this layer.
"""

import argparse
import ctypes
import dataclasses
import functools
import gc
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moe_fn
from moe_fn import MoEConfig, RouterConfig
from moe_fn.testing import weights_for

SLACK = 4e6  # bytes over all repetitions, for variation of the allocator
CONFIG = MoEConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=96)
WEIGHTS = weights_for(CONFIG)


def resident() -> int:
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


def inputs(number: int, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns x and logits with a new number of tokens each time, so that caches by shape would grow."""
    tokens = 1 + 37 * number % 300 if tokens is None else tokens
    return torch.randn(tokens, 64, requires_grad=True), torch.randn(tokens, 8, requires_grad=True)


def forward(number: int) -> None:
    with torch.no_grad():
        moe_fn.moe_forward(CONFIG, WEIGHTS, *inputs(number))


def backward(number: int) -> None:
    leaves = [t.detach().requires_grad_() for t in (WEIGHTS.gate_up, WEIGHTS.down)]
    weights = dataclasses.replace(WEIGHTS, gate_up=leaves[0], down=leaves[1])
    moe_fn.moe_forward(CONFIG, weights, *inputs(number)).square().sum().backward()


def new_configs(number: int) -> None:
    """Calls the layer with a new config, which the opaque op gets as JSON."""
    router = RouterConfig(routed_scaling_factor=1.0 + number / 1000)
    config = MoEConfig(
        num_experts=8, top_k=2, hidden_size=64, intermediate_size=96, router=router, opaque=number % 2 == 0
    )
    moe_fn.moe_forward(config, WEIGHTS, *inputs(number, 5)).sum().backward()


def prepare(number: int) -> None:
    moe_fn.restore_weights(CONFIG, moe_fn.prepare_weights(CONFIG, WEIGHTS))


def replay(number: int) -> None:
    x, logits = inputs(number)
    routing = moe_fn.route_to(CONFIG, WEIGHTS, logits, moe_fn.route(CONFIG, WEIGHTS, logits).expert_ids)
    moe_fn.moe_forward_routed(CONFIG, WEIGHTS, x, routing).sum().backward()


def of_layer(x: Tensor, logits: Tensor) -> Tensor:
    return moe_fn.moe_forward(CONFIG, WEIGHTS, x, logits)


def of_torch(x: Tensor, logits: Tensor) -> Tensor:
    """A plain network of torch with a similar number of ops."""
    z = torch.softmax(logits, -1).topk(2).values
    for matrix in WEIGHTS.down[:4].unbind():
        x = x + (torch.nn.functional.silu(x) @ matrix) @ matrix.t() * z.sum(-1, keepdim=True)
    return x


def let_go_of_guards() -> None:
    """Detaches the finalizers that keep guards of deleted compiled functions alive."""
    guards = torch._dynamo.guards.CheckFunctionManager
    for finalizer, call in list(weakref.finalize._registry.items()):  # type: ignore[attr-defined]
        if isinstance(call.func, functools.partial) and isinstance(getattr(call.func.func, "__self__", None), guards):
            finalizer.detach()


def compiling(function: Callable[..., Tensor]) -> Callable[[int], None]:
    def compile_anew(number: int) -> None:
        torch._dynamo.reset()
        with torch._functorch.config.patch(enable_autograd_cache=False):
            torch.compile(function, backend="aot_eager", fullgraph=True)(*inputs(number, 5)).sum().backward()
        torch._dynamo.reset()
        let_go_of_guards()

    return compile_anew


class Exported(torch.nn.Module):
    """A module around a function, which torch.export requires."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        return self.function(x, logits)


def exporting(function: Callable[..., Tensor]) -> Callable[[int], None]:
    module = Exported(function)

    def export_anew(number: int) -> None:
        torch.export.export(module, tuple(t.detach() for t in inputs(number, 5))).module()(*inputs(number, 5))

    return export_anew


# Each with the plain network that it is compared with, or None.
KINDS: dict[str, tuple[Callable[[int], None], Callable[[int], None] | None]] = {
    "forward": (forward, None),
    "backward": (backward, None),
    "new configs": (new_configs, None),
    "prepare": (prepare, None),
    "replay": (replay, None),
    "compile": (compiling(of_layer), compiling(of_torch)),
    "export": (exporting(of_layer), exporting(of_torch)),
}


def growth(call: Callable[[int], None], times: int) -> int:
    """Returns the bytes by which resident memory grows in `times` calls, after a fifth as many have filled caches."""
    for number in range(max(times // 5, 3)):
        call(number)
    before = resident()
    for number in range(times):
        call(number + times)
    return resident() - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--only", default=",".join(KINDS))
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    leaks = 0
    for kind in options.only.split(","):
        call, other = KINDS[kind]
        start = time.perf_counter()
        found, allowed = growth(call, options.times), 0 if other is None else max(growth(other, options.times), 0)
        leaks += found > allowed + SLACK
        compared = "" if other is None else f", plain torch {allowed / 1e6:.2f} MB"
        print(
            f"{kind:12} {options.times} times: {found / 1e6:7.2f} MB{compared}; {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return leaks


if __name__ == "__main__":
    sys.exit(main())
