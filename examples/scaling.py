"""Scaling of a layer's time with tokens, experts and threads: a table, the worst doubling, and a picture. Needs 4 GB.

python examples/scaling.py [--threads 1,2] [--plot scaling.png]
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import moe_fn

HIDDEN, INTERMEDIATE, TOP_K, EXPERTS, TOKENS = 2048, 768, 8, 128, 64  # Qwen3-30B-A3B
MANY_TOKENS = [2**i for i in range(12)]
MANY_EXPERTS = [8, 16, 32, 64, 128, 256]


def layer(experts: int) -> tuple[moe_fn.MoEConfig, moe_fn.MoEWeights]:
    """Returns the config and prepared weights with arbitrary values, which do not affect the time."""

    def numbers(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return (torch.randn(10007) / shape[-1] ** 0.5).bfloat16().repeat(count // 10007 + 1)[:count].view(shape)

    config = moe_fn.MoEConfig(num_experts=experts, top_k=TOP_K, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE)
    weights = moe_fn.MoEWeights(
        gate_up=numbers(experts, 2 * INTERMEDIATE, HIDDEN), down=numbers(experts, HIDDEN, INTERMEDIATE)
    )
    return config, moe_fn.prepare_weights(config, weights)


def milliseconds(config: moe_fn.MoEConfig, weights: moe_fn.MoEWeights, tokens: int, seconds: float) -> float:
    """Returns the median time of calls with changing routing."""
    x = torch.randn(tokens, HIDDEN).bfloat16()
    routings = [moe_fn.route(config, weights, torch.randn(tokens, config.num_experts)) for _ in range(8)]
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 9:
        start = time.perf_counter()
        moe_fn.moe_forward_routed(config, weights, x, routings[len(times) % 8])
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default=f"1,{torch.get_num_threads()}")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    threads = sorted({int(count) for count in options.threads.split(",")})
    by_tokens: dict[int, list[float]] = {count: [] for count in threads}
    by_experts: dict[int, list[float]] = {count: [] for count in threads}
    for experts in MANY_EXPERTS:
        config, weights = layer(experts)
        for count in threads:
            torch.set_num_threads(count)
            by_experts[count].append(milliseconds(config, weights, TOKENS, options.seconds))
            if experts == EXPERTS:
                by_tokens[count] = [milliseconds(config, weights, tokens, options.seconds) for tokens in MANY_TOKENS]
        del weights
    for title, sizes, table in (
        (f"tokens, {EXPERTS} experts", MANY_TOKENS, by_tokens),
        (f"experts, {TOKENS} tokens", MANY_EXPERTS, by_experts),
    ):
        print(f"\n| {title} | " + " | ".join(f"{count} thread{'s'[: count > 1]}, ms" for count in threads) + " |")
        print("|--:|" + "--:|" * len(threads))
        for i, size in enumerate(sizes):
            print(f"| {size} | " + " | ".join(f"{table[count][i]:.2f}" for count in threads) + " |")
        worst = max(
            (b / a, size, count)
            for count in threads
            for a, b, size in zip(table[count], table[count][1:], sizes[1:], strict=False)
        )
        print(f"\nworst doubling: {worst[0]:.2f} times the time, at {worst[1]} on {worst[2]} threads")
    if options.plot:
        draw(options.plot, by_tokens, by_experts)


def draw(path: Path, by_tokens: dict[int, list[float]], by_experts: dict[int, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for panel, name, sizes, table in (
        (axes[0], "tokens", MANY_TOKENS, by_tokens),
        (axes[1], "experts", MANY_EXPERTS, by_experts),
    ):
        for count, times in table.items():
            panel.plot(sizes, times, marker="o", label=f"{count} threads")
        panel.set(
            xscale="log",
            yscale="log",
            xlabel=name,
            ylabel="ms",
            title=f"Qwen3-30B-A3B's experts, bfloat16, over {name}",
        )
        panel.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
        panel.grid(True, which="both", alpha=0.2)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
