"""Waiting times other than the products: importing, building, compiling, and each call's overhead at one token.

python examples/waiting.py
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch._inductor.config
from torch import Tensor
from torch._inductor import metrics

import moe_fn

IMPORT = "import time, torch; start = time.perf_counter(); import moe_fn; print(time.perf_counter() - start)"
# so small that only overhead is measured
CONFIG = moe_fn.MoEConfig(num_experts=128, top_k=8, hidden_size=64, intermediate_size=32)


def median_microseconds(call: Callable[[], object], calls: int = 2000) -> float:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[calls // 10 :]) * 1e6


def problem(requires_grad: bool) -> tuple[moe_fn.MoEWeights, Tensor, Tensor]:
    weights = moe_fn.MoEWeights(
        gate_up=torch.randn(128, 64, 64).requires_grad_(requires_grad),
        down=torch.randn(128, 64, 32).requires_grad_(requires_grad),
    )
    return weights, torch.randn(1, 64), torch.randn(1, 128)


def compile_seconds(backward: bool) -> tuple[float, int]:
    """Returns the seconds of the first call of a compiled layer without caches, and the number of its kernels."""
    torch._dynamo.reset()
    metrics.reset()
    arguments = problem(backward)
    start = time.perf_counter()
    y = torch.compile(moe_fn.moe_forward, fullgraph=True)(CONFIG, *arguments)
    if backward:
        y.sum().backward()
    return time.perf_counter() - start, metrics.generated_kernel_count


def main() -> None:
    imports = [
        float(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    print(f"import moe_fn, after torch       {statistics.median(imports):.2f} s")
    for info in moe_fn.backends():
        print(f"back-end {info.name}: {'available' if info.available else 'not available'}; {info.reason}")
    with torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(lambda x: x + 1)(torch.ones(3))  # start of Inductor itself
        for backward in (False, True):
            seconds, kernels = compile_seconds(backward)
            print(
                f"compile forward{' and backward' if backward else ' ' * 13}     {seconds:.1f} s, {kernels} kernels "
                "generated"
            )
    with torch.no_grad():
        weights, x, logits = problem(False)
        prepared = moe_fn.prepare_weights(CONFIG, weights)
        compiled = torch.compile(lambda x, logits: moe_fn.moe_forward(CONFIG, prepared, x, logits), fullgraph=True)
        nothing = torch.compile(lambda x: x + 1, fullgraph=True)
        compiled(x, logits), nothing(x)
        print(
            "a call, 1 token, eager           "
            f"{median_microseconds(lambda: moe_fn.moe_forward(CONFIG, prepared, x, logits)):.0f} us"
        )
        print(f"a call, 1 token, compiled        {median_microseconds(lambda: compiled(x, logits)):.0f} us")
        print(f"a call of compiled x + 1         {median_microseconds(lambda: nothing(x)):.0f} us")


if __name__ == "__main__":
    main()
