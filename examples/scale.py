"""A model of bytes, time and memory of one layer on 8 to 2048 GPUs: each format of dispatch, and the cost of uneven
experts.

python examples/scale.py [--machine h100] [--gpus 8,64,512] [--network 50e9] [--zipf 0.6] [--plot scale.png]

Nothing is measured here. G GPUs in nodes of g; n = ep = the largest divisor of G that gives each GPU an expert, and
G / n copies of the weights (dp); t tokens on each GPU, X bytes of a row, K choices, E experts of 3 matrices H x I:

    sent, forward     replicated          2 (n-1)/n n t X                      each GPU has the n t tokens of all
                      all_gather          (n-1) t (2 X + 12 K)
                      all_to_all          8 (n-1) + (n-1)/n t K (2 X + 8)
                      static              (n-1) C (2 X + 8), C = t K           never drops
                      static 2x           the same, C = 2 t K / n, at least 4  drops slots beyond C
    of it, network    all_to_all and static: a share (n - m)/(n - 1), m = min(n, g) in the node; the others are
                      hierarchical, and a node's g GPUs share what they receive: a share (n/m - 1)/(n - 1)
    time there+back   max(sent inside / nvlink, sent outside / network) + messages * latency
    time of experts   max(2 * 3 H I * slots / flops, 3 H I * experts here * weight bytes / hbm)
    time of shared    the same of the shared experts and t tokens; overlaps with the dispatch, half of the time
                      there+back
    layer             max(half, shared) + experts * unevenness + half, and the halves of all_to_all * unevenness
    unevenness        load of the fullest GPU over the mean, of a Zipf load p_e ~ 1/(e+1)^zipf in an order drawn at
                      random (median of 9): experts placed linearly; "balanced": one more slot on each GPU, each for the
                      expert with most load for a copy, then the heaviest on the emptiest GPU (EPLB's global policy,
                      greedily)
    memory            layers * weight bytes * (3 H I experts here + shared) + received rows and results, t tokens at a
                      time
"""

import argparse
import dataclasses
import itertools
import random
import statistics
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One GPU and its links, by vendors' data: dense bf16, one direction. The latency of a collective is a guess."""

    nvlink: float = 450e9
    network: float = 50e9
    hbm: float
    flops: float = 989e12
    memory: float
    node: int = 8
    latency: float = 15e-6


MACHINES = {"h100": Machine(hbm=3.35e12, memory=80e9), "h200": Machine(hbm=4.8e12, memory=141e9)}


@dataclass(frozen=True, kw_only=True)
class Model:
    """The sizes of a published model; `shared` is the intermediate size of its shared experts."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    shared: int
    layers: int


MODELS = {
    "deepseek-v3": Model(experts=256, top_k=8, hidden=7168, inner=2048, shared=2048, layers=58),
    "kimi-k2": Model(experts=384, top_k=8, hidden=7168, inner=2048, shared=2048, layers=60),
}
PHASES = {"prefill": 4096, "decode": 128}  # tokens of each GPU
FORMATS = ("replicated", "all_gather", "all_to_all", "static", "static 2x")
MESSAGES = {"replicated": 1, "all_gather": 4, "all_to_all": 4, "static": 3, "static 2x": 3}
TOKEN_BYTES, WEIGHT_BYTES, ID_BYTES, ROUTING_BYTES = 2, 1, 8, 4


def ranks_of_experts(model: Model, gpus: int) -> int:
    """Returns n: the largest divisor of the number of GPUs that gives each an expert."""
    return max(n for n in range(1, gpus + 1) if gpus % n == 0 and n <= model.experts)


def capacity(model: Model, name: str, n: int, tokens: int) -> int:
    """Returns C of the formats with blocks."""
    return (
        tokens * model.top_k
        if name == "static"
        else min(tokens * model.top_k, max(4, -(-2 * tokens * model.top_k // n)))
    )


def sent(model: Model, name: str, n: int, tokens: int) -> float:
    """Returns the bytes that a GPU sends in forward."""
    x, k = model.hidden * TOKEN_BYTES, model.top_k
    if name == "replicated":
        return 2 * (n - 1) * tokens * x
    if name == "all_gather":
        return (n - 1) * tokens * (2 * x + (ID_BYTES + ROUTING_BYTES) * k)
    if name == "all_to_all":
        return 8 * (n - 1) + (n - 1) / n * tokens * k * (2 * x + ID_BYTES)
    return (n - 1) * capacity(model, name, n, tokens) * (2 * x + ID_BYTES)


def travel(machine: Machine, model: Model, name: str, n: int, tokens: int) -> float:
    """Returns the seconds of dispatch and combine."""
    if n == 1:
        return 0.0
    total, m = sent(model, name, n, tokens), min(n, machine.node)
    outside = total * ((n / m - 1) if name in ("replicated", "all_gather") else (n - m)) / (n - 1)
    return max((total - outside) / machine.nvlink, outside / machine.network) + MESSAGES[name] * machine.latency


def products(machine: Machine, model: Model, slots: float, inner: int, experts: float) -> float:
    """Returns the seconds of the products of `experts` experts with three matrices each, for `slots` rows."""
    matrices = 3 * model.hidden * inner
    return max(2 * matrices * slots / machine.flops, matrices * experts * WEIGHT_BYTES / machine.hbm)


def uneven(loads: list[float], n: int, balanced: bool) -> float:
    """Returns the load of the fullest of n GPUs over the mean."""
    total = sum(loads)
    if not balanced:
        each, more = divmod(len(loads), n)
        ends = [rank * each + min(rank, more) for rank in range(n + 1)]
        return max(sum(loads[a:b]) for a, b in itertools.pairwise(ends)) * n / total
    copies = [1] * len(loads)
    slots = -(-len(loads) // n) + 1
    for _ in range(slots * n - len(loads)):
        copies[max(range(len(loads)), key=lambda e: loads[e] / copies[e])] += 1
    weights, room = [0.0] * n, [slots] * n
    for load in sorted((w / c for w, c in zip(loads, copies, strict=True) for _ in range(c)), reverse=True):
        rank = min((r for r in range(n) if room[r]), key=weights.__getitem__)
        weights[rank] += load
        room[rank] -= 1
    return max(weights) * n / total


def unevenness(model: Model, n: int, zipf: float, balanced: bool, draws: int = 9) -> float:
    """Returns the median of `uneven` over random orders of the experts."""
    loads, found = [1 / (e + 1) ** zipf for e in range(model.experts)], []
    for seed in range(draws):
        random.Random(seed).shuffle(loads)
        found.append(uneven(loads, n, balanced))
    return statistics.median(found)


def seconds(machine: Machine, model: Model, name: str, n: int, tokens: int, factor: float, slots_here: float) -> float:
    """Returns the seconds of the layer in forward."""
    half = travel(machine, model, name, n, tokens) / 2 * (factor if name == "all_to_all" else 1)
    shared = products(machine, model, tokens * (n if name == "replicated" else 1), model.shared, 1)
    return max(half, shared) + products(machine, model, tokens * model.top_k, model.inner, slots_here) * factor + half


def memory(model: Model, name: str, n: int, tokens: int, slots_here: float) -> float:
    """Returns the bytes of all layers' experts and of one layer's rows."""
    k, x = model.top_k, model.hidden * TOKEN_BYTES
    rows = {"replicated": n * tokens, "all_gather": n * tokens, "all_to_all": 2 * tokens * k}.get(
        name
    ) or 2 * n * capacity(model, name, n, tokens)
    weights = model.layers * WEIGHT_BYTES * 3 * model.hidden * (model.inner * slots_here + model.shared)
    return weights + 2 * rows * x


def table(
    machine: Machine, model: Model, tokens: int, gpus: list[int], zipf: float
) -> list[tuple[int, dict[str, float], str]]:
    """Prints a table. Returns (GPUs, microseconds by format with balanced experts, the fastest that fits) by row."""
    print(
        "| GPUs | ep | format | MB sent | us even | us linear | us balanced | GB |\n|--:|--:|:--|--:|--:|--:|--:|--:|"
    )
    found = []
    for count in gpus:
        n = ranks_of_experts(model, count)
        linear, balanced = (unevenness(model, n, zipf, flag) for flag in (False, True))
        here = -(-model.experts // n)
        times: dict[str, float] = {}
        fits: dict[str, float] = {}
        for name in FORMATS:
            even = seconds(machine, model, name, n, tokens, 1.0, here)
            uneven_ = seconds(machine, model, name, n, tokens, linear, here)
            times[name] = 1e6 * seconds(machine, model, name, n, tokens, balanced, here + 1)
            size = memory(model, name, n, tokens, here + 1)
            if size <= machine.memory:
                fits[name] = times[name]
            print(
                f"| {count} | {n} | {name} | {sent(model, name, n, tokens) / 1e6:.1f} | {1e6 * even:.0f} | "
                f"{1e6 * uneven_:.0f} | "
                f"{times[name]:.0f} | {size / 1e9:.0f}{'' if size <= machine.memory else ' (does not fit)'} |"
            )
        lossless = {name: time for name, time in fits.items() if name != "static 2x"}
        # among the formats that drop no slots
        best = min(lossless, key=lossless.__getitem__) if lossless else "nothing fits"
        print(f"| {count} | {n} | **{best}** | | | x{linear:.2f} | x{balanced:.2f} | |")
        found.append((count, times, best))
    return found


def draw(path: Path, results: dict[str, list[tuple[int, dict[str, float], str]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 4), squeeze=False)
    for axis, (title, rows) in zip(axes[0], results.items(), strict=True):
        for name in FORMATS:
            axis.plot([row[0] for row in rows], [row[1][name] for row in rows], marker="o", label=name)
        axis.set(xscale="log", yscale="log", title=title, xlabel="GPUs", ylabel="us a layer, computed")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", choices=MACHINES, default="h100")
    parser.add_argument("--gpus", default="8,16,32,64,128,256,512,1024,2048")
    parser.add_argument("--zipf", type=float, default=0.6)
    parser.add_argument("--plot", type=Path, default=Path("scale.png"))
    for field in dataclasses.fields(Machine):
        parser.add_argument(f"--{field.name}", type=int if field.name == "node" else float)
    options = parser.parse_args()
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Machine)}
    machine = dataclasses.replace(
        MACHINES[options.machine], **{name: value for name, value in given.items() if value is not None}
    )
    results = {}
    for name, model in MODELS.items():
        for phase, tokens in PHASES.items():
            print(f"\n{name}, {phase}: {tokens} tokens a GPU, {options.machine}, computed\n")
            results[f"{name}, {phase}"] = table(
                machine, model, tokens, [int(n) for n in options.gpus.split(",")], options.zipf
            )
    draw(options.plot, results)
    print(f"\n{options.plot}")


if __name__ == "__main__":
    main()
