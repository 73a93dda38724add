"""Decoding: the time of a layer in a compiled model at 1 token, and the time to read its experts' bytes. Needs 8 GB.

python examples/decode.py [--layers 6]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import moe_fn
from moe_fn.kernels.native import library as native
from moe_fn.weights.shapes import prepared_shapes

CONFIG = moe_fn.MoEConfig(  # Qwen3-30B-A3B
    num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768, router=moe_fn.RouterConfig(gate_dtype="input")
)
BYTES = 3 * 8 * 2048 * 768 * 2
TURNS = 200


def random_weights() -> moe_fn.MoEWeights:
    """Returns prepared weights with arbitrary values, without drawing random numbers."""

    def numbers(shape: tuple[int, ...], scale: float) -> Tensor:
        count = torch.Size(shape).numel()
        some = (torch.randn(10007) * scale).bfloat16()
        return native.in_huge_pages(some.repeat(count // 10007 + 1)[:count].view(shape))

    gate_up, down = prepared_shapes(CONFIG, torch.bfloat16)
    router = moe_fn.RouterWeights(gate=(torch.randn(128, 2048) / 45).bfloat16())
    return moe_fn.MoEWeights(gate_up=numbers(gate_up, 0.02), down=numbers(down, 0.03), router=router)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    layers = [random_weights() for _ in range(parser.parse_args().layers)]
    probes = native.probes()
    if probes is None:
        raise SystemExit("the native kernels cannot be built here: see moe_fn.backends()")
    inputs = [torch.randn(1, 2048).bfloat16() for _ in range(16)]
    routings = [[moe_fn.route(CONFIG, layers[0], torch.randn(1, 128)) for _ in layers] for _ in inputs]

    def with_router(x: Tensor, routings: list[moe_fn.Routing]) -> Tensor:
        for weights in layers:
            x = x + moe_fn.moe_forward(CONFIG, weights, x)
        return x

    def experts_alone(x: Tensor, routings: list[moe_fn.Routing]) -> Tensor:
        for weights, routing in zip(layers, routings, strict=True):
            x = x + moe_fn.moe_forward_routed(CONFIG, weights, x, routing)
        return x

    def read(x: Tensor, routings: list[moe_fn.Routing]) -> None:
        for number, weights in enumerate(layers):
            probes.read(weights.gate_up, number * 7 % 5 * BYTES, BYTES)

    runs: dict[str, Callable[[Tensor, list[moe_fn.Routing]], object]] = {
        "reading the experts' bytes": read,
        "compiled, routing given": torch.compile(experts_alone, fullgraph=True),
        "compiled, with the router": torch.compile(with_router, fullgraph=True),
        "eager, with the router": with_router,
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for turn in range(TURNS):
            for name, run in runs.items():
                start = time.perf_counter()
                run(inputs[turn % 16], routings[turn % 16])
                times[name].append((time.perf_counter() - start) * 1e6 / len(layers))
    for name, values in times.items():
        print(f"{name:30s} {statistics.median(values[20:]):7.0f} us a layer")


if __name__ == "__main__":
    main()
