"""Train a byte-level Mixture-of-Experts language model and a dense model of the same active size, on two cores in about
two minutes.

    python examples/tiny_lm.py [--steps 1600] [--seed 0] [--out out]

The text is the language reference that is part of Python (`pydoc_data.topics`). Both models are trained on the same
bytes in the same order, with the same optimizer and learning rate; they differ only in their feed-forward layers: one
wide MLP, or 16 narrow experts of which a token uses 2 (the same number of multiplications). The whole training step
(loss, gradients and optimizer) is a pure function, compiled to one graph. Prints held-out losses, tokens per second,
the load of the experts and a sample of text; draws `out/tiny_lm.png`, and saves the model in `out/tiny_lm.pt` for
`quantize.py`.
"""

import argparse
import math
import pydoc_data.topics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map, tree_unflatten

from moe_fn import MoEConfig, MoEWeights, RouterConfig, RouterWeights, moe_forward_with_stats
from moe_fn.balance import update_correction_bias

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 3, 64, 4, 128, 8
EXPERTS = MoEConfig(
    num_experts=16,
    top_k=2,
    hidden_size=WIDTH,
    intermediate_size=64,
    # Weights of a token sum to 2, so that the 2 experts start at the scale of the halves of the dense MLP.
    router=RouterConfig(correction_bias="scores", routed_scaling_factor=2.0),
)
DENSE_SIZE = EXPERTS.top_k * EXPERTS.intermediate_size
# The rate is good for the dense model: its held-out loss at 2.5, 5, 7, 10 and 14e-3 was 1.396, 1.339, 1.336, 1.334 and
# 1.353; that of the MoE at 5, 7 and 10e-3 was 1.283, 1.276 and 1.297 (seed 0), each below the best of dense.
LEARNING_RATE, WARMUP, WEIGHT_DECAY, BETAS = 7e-3, 0.05, 0.1, (0.9, 0.95)
BALANCE_RATE = 1e-2  # ten times the usual, for a run this short
EVALUATIONS = 10

Params = dict[str, Any]  # a pytree of tensors


# Text


def read_text() -> bytes:
    """Returns the topics in sorted order.

    Topics repeat each other's paragraphs, so each paragraph is kept once: held-out text must not be in the training
    text.
    """
    topics = pydoc_data.topics.topics
    paragraphs = [paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n")]
    return "\n\n".join(dict.fromkeys(paragraphs)).encode()


def split_text(text: bytes, block: int = 4096) -> tuple[Tensor, Tensor]:
    """Returns (training, held out). Every tenth block is held out, as topics differ: the last 10 % are tables about
    types.
    """
    blocks = [torch.tensor(list(text[start : start + block])) for start in range(0, len(text), block)]
    return torch.cat([b for i, b in enumerate(blocks) if i % 10 != 9]), torch.cat(blocks[9::10])


def windows(text: Tensor, starts: Tensor) -> Tensor:
    """Returns [starts, CONTEXT + 1]: inputs are all bytes but the last, targets all but the first."""
    return text[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]


# Model: params and tokens in, logits and expert load out


def matrix(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape) * scale / math.sqrt(shape[-1])


def make_params(moe: bool) -> Params:
    """Returns random parameters. Those that both models have are drawn first, so that they start with equal values."""
    into_residual = (2 * LAYERS) ** -0.5  # 2 branches a layer are added
    layers = [
        {
            "attention_norm": torch.ones(WIDTH),
            "qkv": matrix(3 * WIDTH, WIDTH),
            "out": matrix(WIDTH, WIDTH, scale=into_residual),
            "feed_forward_norm": torch.ones(WIDTH),
        }
        for _ in range(LAYERS)
    ]
    params = {"embed": torch.randn(256, WIDTH), "layers": layers, "norm": torch.ones(WIDTH), "head": matrix(256, WIDTH)}
    for layer in layers:
        layer["feed_forward"] = make_experts(into_residual) if moe else make_mlp(into_residual)
    return params


def make_experts(scale: float) -> MoEWeights:
    count, size = EXPERTS.num_experts, EXPERTS.intermediate_size
    router = RouterWeights(gate=matrix(count, WIDTH))
    return MoEWeights(
        gate_up=matrix(count, 2 * size, WIDTH), down=matrix(count, WIDTH, size, scale=scale), router=router
    )


def make_mlp(scale: float) -> Params:
    return {"gate_up": matrix(2 * DENSE_SIZE, WIDTH), "down": matrix(WIDTH, DENSE_SIZE, scale=scale)}


def rotate(x: Tensor) -> Tensor:
    """Returns x [batch, heads, time, size] with rotary position embeddings."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2]).unsqueeze(1) * 1000.0 ** (-torch.arange(half) / half)
    a, b = x.split(half, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def attention(layer: Params, x: Tensor) -> Tensor:
    q, k, v = F.linear(x, layer["qkv"]).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
    return F.linear(mixed.transpose(1, 2).flatten(2), layer["out"])


def feed_forward(config: MoEConfig, weights: MoEWeights | Params, bias: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns y and the load of each expert, which is empty for a dense layer.

    `bias` is added for the choice of experts; it has no gradient.
    """
    if isinstance(weights, MoEWeights):
        weights = replace(weights, router=replace(weights.router, correction_bias=bias))
        y, stats = moe_forward_with_stats(config, weights, x)
        return y, stats.expert_load
    gate, up = F.linear(x, weights["gate_up"]).chunk(2, -1)
    return F.linear(F.silu(gate) * up, weights["down"]), bias.new_zeros(bias.shape)


def model(params: Params, biases: Tensor, tokens: Tensor, config: MoEConfig = EXPERTS) -> tuple[Tensor, Tensor]:
    """tokens [batch, time], biases [layers, experts] -> logits [batch, time, 256], load [layers, experts]."""
    x = F.embedding(tokens, params["embed"])
    loads = []
    for layer, bias in zip(params["layers"], biases, strict=True):
        x = x + attention(layer, F.rms_norm(x, (WIDTH,), layer["attention_norm"]))
        y, load = feed_forward(config, layer["feed_forward"], bias, F.rms_norm(x, (WIDTH,), layer["feed_forward_norm"]))
        x = x + y
        loads.append(load)
    return F.linear(F.rms_norm(x, (WIDTH,), params["norm"]), params["head"]), torch.stack(loads)


def loss_of_batch(params: Params, biases: Tensor, batch: Tensor, config: MoEConfig = EXPERTS) -> tuple[Tensor, Tensor]:
    logits, load = model(params, biases, batch[:, :-1], config)
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), load


# Training: state and batch in, state and loss out


class State(NamedTuple):
    """The state of the optimizer (AdamW): parameters, and running means of gradients and of their squares."""

    params: Params
    mean: Params
    square: Params


def train_step(state: State, biases: Tensor, batch: Tensor, rate: Tensor, step: Tensor) -> tuple[State, Tensor, Tensor]:
    """(state, biases, batch) -> (state, loss, load).

    Rate and step are tensors, as Python numbers would be constants of the graph.
    """
    gradients, (loss, load) = torch.func.grad_and_value(loss_of_batch, has_aux=True)(state.params, biases, batch)
    mean = tree_map(lambda m, g: m.lerp(g, 1 - BETAS[0]), state.mean, gradients)
    square = tree_map(lambda s, g: s.lerp(g * g, 1 - BETAS[1]), state.square, gradients)

    def updated(p: Tensor, m: Tensor, s: Tensor) -> Tensor:
        direction = m / (1 - BETAS[0] ** step) / ((s / (1 - BETAS[1] ** step)).sqrt() + 1e-8)
        return p - rate * (direction + (WEIGHT_DECAY * p if p.ndim > 1 else 0))

    return State(tree_map(updated, state.params, mean, square), mean, square), loss, load


def learning_rate(done: float) -> float:
    """Returns the rate: linear warm-up, then a cosine to zero; done is the progress from 0 to 1."""
    return LEARNING_RATE * min(1.0, done / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * done))


def held_out_loss(params: Params, biases: Tensor, text: Tensor, config: MoEConfig = EXPERTS) -> float:
    """Returns the mean loss over all windows of the text, computed eagerly by the same functions."""
    starts = torch.arange(0, len(text) - CONTEXT, CONTEXT)
    with torch.no_grad():
        losses = [
            loss_of_batch(params, biases, windows(text, some), config)[0].item() * len(some)
            for some in starts.split(32)
        ]
    return sum(losses) / len(starts)


def save(path: Path, params: Params, biases: Tensor) -> None:
    """Saves the tensors of a model with experts, by their pytree paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    places, _ = tree_flatten_with_path((params, biases))
    torch.save({keystr(place): leaf for place, leaf in places if isinstance(leaf, Tensor)}, path)


def load(path: Path) -> tuple[Params, Tensor]:
    """Loads the parameters and biases that `save` wrote."""
    tensors = torch.load(path, weights_only=True)
    places, tree = tree_flatten_with_path((make_params(moe=True), torch.zeros(LAYERS, EXPERTS.num_experts)))
    params, biases = tree_unflatten([tensors.get(keystr(place)) for place, _ in places], tree)
    return params, biases


@dataclass
class Run:
    """A trained model and the record of its training."""

    params: Params
    biases: Tensor
    losses: list[float] = field(default_factory=list)  # of each step
    loads: list[Tensor] = field(default_factory=list)  # [layers, experts] of each step
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)
    tokens_per_second: float = math.nan  # of the compiled training steps only

    @property
    def final(self) -> float:
        return self.held_out[-1][1]


def train(name: str, moe: bool, training: Tensor, held_out: Tensor, steps: int, seed: int) -> Run:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(seed)
    params = make_params(moe)
    state = State(params, tree_map(torch.zeros_like, params), tree_map(torch.zeros_like, params))
    run = Run(params, torch.zeros(LAYERS, EXPERTS.num_experts))
    order = torch.Generator().manual_seed(seed)  # both models have the same batches
    compiled = torch.compile(train_step, fullgraph=True)
    print(f"{name}: compiling the training step ...", flush=True)
    seconds = 0.0
    for step in range(1, steps + 1):
        batch = windows(training, torch.randint(len(training) - CONTEXT, (BATCH,), generator=order))
        start = time.perf_counter()
        rate = torch.tensor(learning_rate(step / steps))
        state, loss, load = compiled(state, run.biases, batch, rate, torch.tensor(float(step)))
        if moe:  # overloaded experts become less likely to be chosen: a pure update without gradients
            run.biases = update_correction_bias(run.biases, load, BALANCE_RATE)  # of all layers
        if step == 1:
            graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
            print(f"{name}: compiled in {time.perf_counter() - start:.0f} s")
        else:
            seconds += time.perf_counter() - start
        run.losses.append(loss.item())
        run.loads.append(load)
        if step % max(1, steps // EVALUATIONS) == 0 or step == steps:
            run.held_out.append((step, held_out_loss(state.params, run.biases, held_out)))
        show_progress(name, step, steps, run, seconds)
    recompiles = counters["stats"]["unique_graphs"] - graphs
    print(f"{name}: compiled training step: {graphs} graph, {breaks} breaks, {recompiles} recompiles")
    assert (graphs, breaks, recompiles) == (1, 0, 0)
    run.params = state.params
    run.tokens_per_second = (steps - 1) * BATCH * CONTEXT / max(seconds, 1e-9)
    return run


def show_progress(name: str, step: int, steps: int, run: Run, seconds: float) -> None:
    """Prints a line that overwrites itself on a terminal; otherwise a line for every tenth of the steps."""
    terminal = sys.stdout.isatty()
    if not terminal and step % max(1, steps // 10) and step < steps:
        return
    bar = ("#" * (24 * step // steps)).ljust(24, ".")
    held_out = f"  held out {run.held_out[-1][1]:.3f}" if run.held_out else ""
    speed = (step - 1) / seconds if seconds else 0.0
    left = f"  {(steps - step) / speed:3.0f} s left" if speed else ""
    line = (
        f"{name:5} [{bar}] {step}/{steps}  loss {run.losses[-1]:.3f}{held_out}  {speed * BATCH * CONTEXT:6,.0f} "
        f"tokens/s{left}"
    )
    print(f"\r{line}\033[K" if terminal else line, end="\n" if not terminal or step == steps else "", flush=True)


# Report


def bigram_loss(training: Tensor, held_out: Tensor) -> float:
    """Returns the held-out loss of byte pairs counted in the training text: a model with one byte of context."""
    counts = torch.bincount(training[:-1] * 256 + training[1:], minlength=256 * 256).view(256, 256) + 0.1
    return F.nll_loss((counts / counts.sum(1, keepdim=True)).log()[held_out[:-1]], held_out[1:]).item()


def sample(run: Run, prompt: str, length: int = 300, temperature: float = 0.7) -> str:
    tokens = list(prompt.encode())
    with torch.no_grad():
        for _ in range(length):
            logits, _ = model(run.params, run.biases, torch.tensor([tokens[-CONTEXT:]]))
            tokens.append(int(torch.multinomial((logits[0, -1] / temperature).softmax(-1), 1)))
    return bytes(tokens).decode(errors="replace")


def size_of(params: Params, active: bool) -> int:
    """Returns the number of parameters; if active, of those that one token uses: top_k of the experts."""
    total = sum(leaf.numel() for leaf in tree_leaves(params) if leaf is not None)
    experts = [w for layer in params["layers"] if isinstance(w := layer["feed_forward"], MoEWeights)]
    idle = 1 - EXPERTS.top_k / EXPERTS.num_experts
    return total - round(idle * sum(w.gate_up.numel() + w.down.numel() for w in experts)) if active else total


def print_table(moe: Run, dense: Run, bigram: float) -> None:
    print(f"\n{'':24}{'held-out loss':>14}{'':>12}{'parameters':>14}{'':>12}{'training':>12}")
    print(f"{'':24}{'nats/byte':>14}{'bits/byte':>12}{'active':>14}{'total':>12}{'tokens/s':>12}")
    for name, run in ((f"MoE, {EXPERTS.top_k} of {EXPERTS.num_experts} experts", moe), ("dense", dense)):
        sizes = f"{size_of(run.params, True):>14,}{size_of(run.params, False):>12,}"
        print(f"{name:24}{run.final:>14.4f}{run.final / math.log(2):>12.4f}{sizes}{run.tokens_per_second:>12,.0f}")
    for name, loss in (("byte pairs (bigram)", bigram), ("uniform", math.log(256))):
        print(f"{name:24}{loss:>14.4f}{loss / math.log(2):>12.4f}")


def draw(path: Path, moe: Run, dense: Run, bigram: float) -> str:
    """Draws two panels: the loss curves, and the load of every expert over training in each layer.

    Returns a message for the user.
    """
    try:
        import matplotlib
    except ImportError:
        return "No picture: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2)
    draw_losses(left.subplots(), {"MoE": (moe, "C0"), "dense": (dense, "C1")}, bigram)
    draw_load(right, right.subplots(LAYERS, 1, sharex=True), moe)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return f"Picture: {path}"


def draw_losses(axes: Any, runs: dict[str, tuple[Run, str]], bigram: float) -> None:
    for name, (run, color) in runs.items():
        smooth = smoothed(torch.tensor(run.losses), max(1, len(run.losses) // 50))
        axes.plot(
            range(1, len(smooth) + 1),
            smooth,
            color=color,
            alpha=0.45,
            linewidth=1.2,
            label=f"{name}, training (smoothed)",
        )
        axes.plot(
            *zip(*run.held_out, strict=True),
            "o-",
            color=color,
            markersize=4,
            label=f"{name}, held out: {run.final:.3f} at the end",
        )
    axes.axhline(bigram, color="gray", linestyle=":", linewidth=1.2, label=f"byte pairs (bigram): {bigram:.3f}")
    axes.set(
        xlabel="training step",
        ylabel="loss (nats per byte)",
        ylim=(0.9 * min(map(min, (r.losses for r, _ in runs.values()))), 3.5),
    )
    axes.set_title("MoE and dense, same active parameters, same bytes")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)


def draw_load(figure: Any, all_axes: Any, run: Run) -> None:
    loads = torch.stack(run.loads).float()
    ratio = loads / loads.mean(-1, keepdim=True)
    bins = torch.stack([part.mean(0) for part in ratio.tensor_split(min(100, len(ratio)))])  # [bins, layers, experts]
    for layer, axes in enumerate(all_axes):
        extent = (0, len(ratio), EXPERTS.num_experts - 0.5, -0.5)
        image = axes.imshow(
            bins[:, layer].T, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, extent=extent, interpolation="nearest"
        )
        axes.set(
            ylabel=f"layer {layer + 1}\nexpert", yticks=range(0, EXPERTS.num_experts, max(1, EXPERTS.num_experts // 4))
        )
    all_axes[0].set_title("Load of each expert under loss-free balancing")
    all_axes[-1].set_xlabel("training step")
    figure.colorbar(image, ax=list(all_axes), label="bytes sent to the expert / mean over experts", extend="max")


def smoothed(values: Tensor, width: int) -> list[float]:
    """Returns means over the last `width` values, fewer at the beginning."""
    sums = torch.cat([torch.zeros(1), values.cumsum(0)])
    ends = torch.arange(1, len(values) + 1)
    starts = (ends - width).clamp(min=0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    args = parser.parse_args()
    start = time.perf_counter()
    training, held_out = split_text(read_text())
    print(
        f"{len(training):,} bytes to train on, {len(held_out):,} held out; {args.steps} steps of {BATCH} x {CONTEXT} "
        "bytes"
    )
    moe = train("MoE", True, training, held_out, args.steps, args.seed)
    dense = train("dense", False, training, held_out, args.steps, args.seed)
    bigram = bigram_loss(training, held_out)
    print_table(moe, dense, bigram)
    load = torch.stack(moe.loads[-100:]).float().mean(0)
    print(
        "\nLoad of the busiest expert over the mean of all, last 100 steps, layer by layer:",
        ", ".join(f"{ratio:.2f}" for ratio in load.amax(1) / load.mean(1)),
    )
    prompt = 'The "with" statement '
    save(args.out / "tiny_lm.pt", moe.params, moe.biases)
    print(f"\nA sample:\n\n{sample(moe, prompt)}\n")
    print(f"{draw(args.out / 'tiny_lm.png', moe, dense, bigram)}; {time.perf_counter() - start:.0f} s in all")
    # Experts take time to specialize: the MoE is better from about step 500 on.
    assert moe.final < dense.final or args.steps < 1000, "the MoE should beat the dense model of the same active size"


if __name__ == "__main__":
    main()
