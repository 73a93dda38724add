"""Balance of experts under a skewed load that drifts: one slot an expert, replicas placed once, replicas placed
repeatedly.

    python examples/balance.py [--steps 300] [--every 30] [--seed 0] [--out out]

The experts of DeepSeek-V3 (256, in 8 groups) on 4 nodes of 8 GPUs, with 32 spare slots; 4 layers. How often an expert
is chosen follows Zipf's law, and the popularity of experts changes slowly. A step takes as long as its fullest GPU, so
mean / max of the GPUs' loads is the utilization. Prints a table and draws `out/balance.png`.
"""

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moe_fn.balance import (
    Placement,
    balancedness,
    expert_load,
    gpu_load,
    load_window,
    logical_load,
    physical_ids,
    place_experts,
    placement_at,
    placement_of_slots,
    push,
    sends_per_gpu,
    total,
    transfers,
)

LAYERS, EXPERTS, SLOTS, GROUPS, NODES, GPUS = 4, 256, 288, 8, 4, 32
TOKENS, TOP_K = 16384, 8
ZIPF, MEMORY = 0.8, 0.9998  # popularity of rank r is r^-0.8; how much of the popularity of one step the next one keeps
EXPERT_MB = 3 * 7168 * 2048 / 1e6  # one expert in float8


@dataclass
class Run:
    """One way to place experts, and its results."""

    name: str
    placement: Placement
    again: bool = False  # whether experts are placed again during the run
    even: list[float] = field(default_factory=list)  # of each step: mean over layers of mean / max
    moved: list[int] = field(default_factory=list)  # transfers of each change
    busiest: list[int] = field(default_factory=list)  # transfers of the busiest sender, of each change
    seconds: float = 0.0  # spent on placing and planning


def popularity(state: Tensor) -> Tensor:
    """Returns the share of each expert in each layer: Zipf's law in the order of a state that drifts."""
    rank = state.argsort(-1, descending=True).argsort(-1) + 1
    share = rank.double() ** -ZIPF
    return share / share.sum(-1, keepdim=True)


def drift(state: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the next state of a random walk with constant variance."""
    return MEMORY * state + (1 - MEMORY**2) ** 0.5 * torch.randn(state.shape, generator=generator, dtype=torch.float64)


def draw_load(state: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the number of slots of each expert in one step, [layers, E] int64."""
    ids = popularity(state).multinomial(TOKENS * TOP_K, replacement=True, generator=generator)
    return torch.stack([expert_load(row, EXPERTS) for row in ids])


def place_again(run: Run, load: Tensor) -> None:
    """Computes a new placement for the observed loads, and records its cost."""
    start = time.perf_counter()
    new = place_experts(load, SLOTS, GROUPS, NODES, GPUS, previous=run.placement)
    moves = transfers(run.placement, new, GPUS)
    run.seconds += time.perf_counter() - start
    run.moved.append(len(moves.transfers))
    run.busiest.append(max(sends_per_gpu(moves)))
    run.placement = new


def simulate(steps: int, every: int, seed: int) -> tuple[list[Run], Tensor]:
    """Returns the runs, which have the same loads, and the load of the last step."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(LAYERS, EXPERTS, generator=generator, dtype=torch.float64)
    first = draw_load(state, generator)
    placed = place_experts(first, SLOTS, GROUPS, NODES, GPUS)
    plain = placement_of_slots(torch.arange(EXPERTS).expand(LAYERS, -1), EXPERTS)
    runs = [
        Run("one slot an expert", plain),
        Run("placed once", placed),
        Run(f"placed every {every} steps", placed, again=True),
    ]
    window, load = load_window(every, LAYERS, EXPERTS), first
    for step in range(steps):
        load = draw_load(state, generator)
        for run in runs:
            run.even.append(float(balancedness(gpu_load(run.placement, load, GPUS)).mean()))
        window = push(window, load)
        if (step + 1) % every == 0:
            for run in runs:
                if run.again:
                    place_again(run, total(window))
        state = drift(state, generator)
    return runs, load


def routed_load(placement: Placement, load: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the load per GPU of one layer if each token picks its replica by its position, instead of an even split
    between replicas.
    """
    ids = (
        torch.arange(EXPERTS)
        .repeat_interleave(load)[torch.randperm(int(load.sum()), generator=generator)]
        .view(TOKENS, TOP_K)
    )
    of_slots = expert_load(physical_ids(placement, ids), SLOTS)
    assert torch.equal(logical_load(placement, of_slots), load)
    return of_slots.view(GPUS, -1).sum(-1)


def report(runs: list[Run], load: Tensor) -> None:
    print(
        f"{'':24}{'GPUs at work':>14}{'last step':>12}{'worst step':>12}{'moved':>14}{'sent by one':>14}{'to plan':>11}"
    )
    for run in runs:
        even = torch.tensor(run.even)
        line = f"{run.name:24}{even.mean():>14.1%}{even[-1]:>12.1%}{even.min():>12.1%}"
        if run.again and run.moved:
            per_layer, changes = LAYERS, len(run.moved)
            share = sum(run.moved) / (changes * per_layer * SLOTS)
            sent = sum(run.busiest) / (changes * per_layer) * EXPERT_MB
            line += f"{share:>8.0%} slots{sent:>11,.0f} MB{run.seconds / (changes * per_layer) * 1e3:>8.1f} ms"
        print(line)
    print("moved, sent by the busiest GPU, and time to plan: of one layer, each time that experts are placed")
    one = placement_at(runs[-1].placement, 0)
    routed = routed_load(one, load[0], torch.Generator().manual_seed(1))
    shared = gpu_load(one, load[0], GPUS)
    print(f"layer 0, last step: {balancedness(routed).item():.1%} by the tokens' own choice of replicas, ", end="")
    print(f"{balancedness(shared).item():.1%} if they shared evenly")


def draw(runs: list[Run], load: Tensor, every: int, path: Path) -> str:
    """Draws the picture if matplotlib is installed. Returns a message for the user."""
    try:
        import matplotlib
    except ImportError:
        return "No picture: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = ("#9aa0a6", "#e8710a", "#1a73e8")
    figure = plt.figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for run, color in zip(runs, colors, strict=True):
        left.plot([100 * even for even in run.even], color=color, label=run.name)
    for step in range(every, len(runs[0].even), every):
        left.axvline(step - 0.5, color="#dadce0", linewidth=0.8, zorder=0)
    left.set(ylim=(0, 100), xlabel="step (lines: experts are placed again)", ylabel="mean / max of the GPUs' loads, %")
    left.set_title(f"{EXPERTS} experts in {SLOTS} slots on {GPUS} GPUs, a load that drifts")
    left.legend(loc="lower left")
    for run, color in ((runs[0], colors[0]), (runs[-1], colors[-1])):
        per_gpu = gpu_load(run.placement, load, GPUS)[0].sort(descending=True).values
        right.bar(range(GPUS), (per_gpu / per_gpu.mean()).tolist(), color=color, alpha=0.75, width=0.9, label=run.name)
    right.axhline(1, color="black", linewidth=0.8)
    right.set(xlabel="GPUs, fullest first", ylabel="load / mean", title="layer 0, the last step")
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return f"Picture: {path}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=30, help="steps between placements, and in the window of loads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    args = parser.parse_args()
    runs, load = simulate(args.steps, args.every, args.seed)
    report(runs, load)
    print(draw(runs, load, args.every, args.out / "balance.png"))


if __name__ == "__main__":
    main()
