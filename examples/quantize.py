"""Quantization of the experts of the demo's language model: bytes, held-out loss and time of each format.

    python examples/quantize.py [--model out/tiny_lm.pt] [--out out] [--steps 1600] [--adapt 200]

Takes the model that `python examples/tiny_lm.py` (make demo) has trained, or trains it first. Its experts, 9 of 10 of
all parameters, are quantized to each format in turn: rounded to the nearest code, without calibration. Finally LoRA
adapters are trained on the experts of 4 bits (QLoRA): only the adapters have gradients, and they recover most of the
loss of rounding. Prints a table, and draws the loss over the bits of a weight to `out/quantize.png`.
"""

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiny_lm
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from moe_fn import ActivationQuantConfig, LoRAConfig, LoRAWeights, MoEConfig, MoEWeights, QuantConfig, quantize_weights

Params = dict[str, Any]


def by(scheme: Any, size: int | None = None, static: bool = False) -> ActivationQuantConfig:
    """Returns the config of inputs rounded with a scale for each token, or for each `size` elements of a token."""
    return ActivationQuantConfig(
        scheme=scheme, granularity="group" if size else "token", group_size=size, static=static
    )


def groups(scheme: Any, size: int, **more: Any) -> QuantConfig:
    return QuantConfig(scheme=scheme, granularity="group", group_size=size, **more)


# Experts here have 64 columns: blocks are 32 x 32 instead of DeepSeek's 128 x 128.
FORMATS: dict[str, QuantConfig | None] = {
    "float32": None,
    "fp8, by tensor": QuantConfig(scheme="fp8_e4m3", granularity="tensor"),
    "fp8, by channel, w8a8": QuantConfig(scheme="fp8_e4m3", granularity="channel", activations=by("fp8_e4m3")),
    "fp8, blocks, w8a8": QuantConfig(
        scheme="fp8_e4m3", granularity="block", block_shape=(32, 32), activations=by("fp8_e4m3", 32)
    ),
    "mxfp8, w8a8": groups("mxfp8", 32, activations=by("mxfp8", 32)),
    "int8, by channel": QuantConfig(scheme="int8", granularity="channel"),
    "int8, by channel, w8a8": QuantConfig(scheme="int8", granularity="channel", activations=by("int8")),
    "int8, groups of 32": groups("int8", 32),
    "int4, by channel": QuantConfig(scheme="int4", granularity="channel"),
    "int4, groups of 32": groups("int4", 32),
    "int4, groups of 32, zero points": groups("int4", 32, zero_points=True),
    "int4, groups of 32, w4a8": groups("int4", 32, activations=by("int8")),
    "mxfp4": groups("mxfp4", 32),
    "nvfp4": groups("nvfp4", 16),
    "nvfp4, w4a4": groups("nvfp4", 16, activations=by("nvfp4", 16)),
}
ADAPTED = "int4, by channel"
RANK, ADAPTING_RATE = 4, 3e-3


@dataclass(frozen=True)
class Row:
    """One line of the table. size: bytes of all experts, with scales."""

    name: str
    size: int
    bits: float
    loss: float
    tokens_per_second: float


def quantized(params: Params, quant: QuantConfig | None) -> tuple[MoEConfig, Params]:
    """Returns the config and the parameters of the model with its experts in a format."""
    if quant is None:
        return tiny_lm.EXPERTS, params
    layers = []
    for layer in params["layers"]:
        config, experts = quantize_weights(tiny_lm.EXPERTS, layer["feed_forward"], quant)
        layers.append(layer | {"feed_forward": experts})
    return config, params | {"layers": layers}


def size_of_experts(params: Params) -> int:
    parts = [(w.gate_up, w.down, w.quant) for layer in params["layers"] for w in [layer["feed_forward"]]]
    return sum(t.numel() * t.element_size() for t in tree_leaves(parts) if t is not None)


def tokens_per_second(config: MoEConfig, params: Params, biases: Tensor, text: Tensor, seconds: float) -> float:
    """Returns tokens per second of the compiled forward pass on batches of the demo's size."""
    torch._dynamo.reset()
    batches = [tiny_lm.windows(text, torch.arange(8) * tiny_lm.CONTEXT + i)[:, :-1] for i in range(16)]
    run = torch.compile(lambda tokens: tiny_lm.model(params, biases, tokens, config)[0], fullgraph=True)
    times = []
    with torch.no_grad():
        run(batches[0])
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 5:
            start = time.perf_counter()
            run(batches[len(times) % len(batches)])
            times.append(time.perf_counter() - start)
    return batches[0].numel() / sorted(times)[len(times) // 2]


def measured(name: str, params: Params, biases: Tensor, text: Tensor, seconds: float) -> Row:
    config, small = quantized(params, FORMATS[name])
    weights = sum(w.gate_up.numel() + w.down.numel() for layer in params["layers"] for w in [layer["feed_forward"]])
    size, loss = size_of_experts(small), tiny_lm.held_out_loss(small, biases, text, config)
    return Row(name, size, 8 * size / weights, loss, tokens_per_second(config, small, biases, text, seconds))


# Adapters on experts of 4 bits


def with_adapters(params: Params, adapters: list[LoRAWeights]) -> Params:
    pairs = zip(params["layers"], adapters, strict=True)
    return params | {
        "layers": [layer | {"feed_forward": replace(layer["feed_forward"], lora=lora)} for layer, lora in pairs]
    }


def new_adapters(weights: MoEWeights) -> LoRAWeights:
    """Returns adapters with normal A and zero B, which change nothing at first."""
    experts, width, size = tiny_lm.EXPERTS.num_experts, tiny_lm.WIDTH, tiny_lm.EXPERTS.intermediate_size
    return LoRAWeights(
        gate_up_a=tiny_lm.matrix(1, experts, RANK, width),
        gate_up_b=torch.zeros(1, experts, 2 * size, RANK),
        down_a=tiny_lm.matrix(1, experts, RANK, size),
        down_b=torch.zeros(1, experts, width, RANK),
    )


def adapted(params: Params, biases: Tensor, training: Tensor, held_out: Tensor, steps: int) -> float:
    """Returns the held-out loss of the quantized model after training only the adapters for `steps` steps."""
    torch._dynamo.reset()
    config, small = quantized(params, FORMATS[ADAPTED])
    config = replace(config, lora=LoRAConfig(num_adapters=1, rank=RANK))
    adapters = [new_adapters(layer["feed_forward"]) for layer in small["layers"]]
    adapters = tree_map(lambda t: t.requires_grad_(), adapters)
    optimizer = torch.optim.Adam([t for t in tree_leaves(adapters) if t is not None], lr=ADAPTING_RATE)

    @torch.compile(fullgraph=True)
    def loss_of(adapters: list[LoRAWeights], batch: Tensor) -> Tensor:
        return tiny_lm.loss_of_batch(with_adapters(small, adapters), biases, batch, config)[0]

    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = ADAPTING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        starts = torch.randint(len(training) - tiny_lm.CONTEXT, (tiny_lm.BATCH,), generator=generator)
        loss_of(adapters, tiny_lm.windows(training, starts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return tiny_lm.held_out_loss(with_adapters(small, tree_map(Tensor.detach, adapters)), biases, held_out, config)


# Report


def draw(path: Path, rows: list[Row], adapted_loss: float | None) -> str:
    try:
        import matplotlib
    except ImportError:
        return "No picture: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for i, row in enumerate(rows[1:]):
        axes.plot(row.bits, row.loss, "os^"[i % 3], color=f"C{i % 10}", label=f"{row.name}: {row.loss:.4f}")
    if adapted_loss is not None:
        axes.plot(
            next(row.bits for row in rows if row.name == ADAPTED),
            adapted_loss,
            "*",
            color="black",
            markersize=11,
            label="and LoRA",
        )
    axes.axhline(rows[0].loss, color="gray", linestyle=":", label=f"float32 (32 bits): {rows[0].loss:.4f}")
    axes.set(xlabel="bits for each weight of an expert, scales included", ylabel="held-out loss (nats per byte)")
    axes.set_title("Experts in few bits")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return f"Picture: {path}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("out/tiny_lm.pt"),
        help="the model that make demo saves; trained if it does not exist",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    parser.add_argument("--steps", type=int, default=1600, help="of training, if the model does not exist")
    parser.add_argument("--adapt", type=int, default=200, help="steps of training adapters; 0: none")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing, for each format")
    args = parser.parse_args()
    training, held_out = tiny_lm.split_text(tiny_lm.read_text())
    if args.model.exists():
        params, biases = tiny_lm.load(args.model)
    else:
        run = tiny_lm.train("MoE", True, training, held_out, args.steps, seed=0)
        params, biases = run.params, run.biases
        tiny_lm.save(args.model, params, biases)
    rows = []
    print(f"\n{'experts as':34}{'bytes':>10}{'bits':>7}{'held-out loss':>15}{'more':>9}{'tokens/s':>11}")
    for name in FORMATS:
        row = measured(name, params, biases, held_out, args.seconds)
        rows.append(row)
        more = row.loss - rows[0].loss
        print(
            f"{name:34}{row.size:>10,}{row.bits:>7.2f}{row.loss:>15.4f}{more:>+9.4f}{row.tokens_per_second:>11,.0f}",
            flush=True,
        )
    loss = adapted(params, biases, training, held_out, args.adapt) if args.adapt else None
    if loss is not None:
        print(
            f"{f'{ADAPTED}, and LoRA of rank {RANK}':34}{'':>17}{loss:>15.4f}{loss - rows[0].loss:>+9.4f}    "
            f"({args.adapt} steps)"
        )
    print(draw(args.out / "quantize.png", rows, loss))


if __name__ == "__main__":
    main()
