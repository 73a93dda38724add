"""Times the layer beside transformers' experts back-ends, in one run, contestants taking turns: `make bench`.

Every contestant is the whole block, router included, with the same weights and the same inputs; inputs (so the routing) change from
call to call. Each is first held to the reference. Prints a table of medians in milliseconds and writes JSON.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import moe_fn
import moe_fn.reference
from moe_fn import MoEConfig, MoEWeights, RouterConfig, RouterWeights

SHAPES = {"qwen3-30b-a3b": (128, 8, 2048, 768), "olmoe": (64, 8, 2048, 1024)}  # experts, top_k, hidden, intermediate
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
INPUTS = 8  # different inputs that calls cycle through
Contestant = Callable[[Tensor], Tensor]


def random_weights(config: MoEConfig, dtype: torch.dtype) -> MoEWeights:
    experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype).normal_(0, shape[-1] ** -0.5, generator=generator)

    gate = normal(experts, hidden)
    return MoEWeights(gate_up=normal(experts, 2 * inner, hidden), down=normal(experts, hidden, inner), router=RouterWeights(gate=gate))


def transformers_block(config: MoEConfig, weights: MoEWeights, implementation: str) -> Contestant:
    """Qwen3's own block around the same weights (OLMoE's is the same function)."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    settings = Qwen3MoeConfig(
        num_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.intermediate_size,
        norm_topk_prob=True,
        experts_implementation=implementation,
    )
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(settings)
    assert weights.router is not None
    state = {"experts.gate_up_proj": weights.gate_up, "experts.down_proj": weights.down, "gate.weight": weights.router.gate}
    block.load_state_dict(state, assign=True)
    block.requires_grad_(False)
    return lambda x: block(x.unsqueeze(0))[0]


def contestants(config: MoEConfig, weights: MoEWeights) -> dict[str, Contestant]:
    grouped = transformers_block(config, weights, "grouped_mm")
    layer = torch.compile(lambda x: moe_fn.moe_forward(config, weights, x), fullgraph=True)
    return {
        "moe_fn compiled": layer,
        "moe_fn eager": lambda x: moe_fn.moe_forward(config, weights, x),
        "transformers eager": transformers_block(config, weights, "eager"),
        "transformers grouped_mm": grouped,
        "transformers grouped_mm compiled": torch.compile(grouped, fullgraph=True),
    }


def check(config: MoEConfig, weights: MoEWeights, x: Tensor, runs: dict[str, Contestant]) -> None:
    """A contestant that is fast and wrong is no contestant. By the median token: a tie among bfloat16 logits may go either way."""
    expected = moe_fn.reference.moe_forward(config, weights, x[:4])
    for name, run in runs.items():
        error = ((run(x)[:4].double() - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()
        assert error < (2e-2 if x.dtype == torch.bfloat16 else 1e-5), f"{name}: relative error {error:.1e}"


def time_cell(config: MoEConfig, weights: MoEWeights, tokens: int, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Median milliseconds of each contestant; they take turns until the time is up, at least 5 turns each."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(tokens)
    inputs = [torch.empty(tokens, config.hidden_size, dtype=dtype).normal_(generator=generator) for _ in range(INPUTS)]
    runs, times = contestants(config, weights), {}
    with torch.no_grad():
        check(config, weights, inputs[0], runs)
        end, turn = time.perf_counter() + seconds, 0
        while turn < 5 or time.perf_counter() < end:
            for name, run in runs.items():
                start = time.perf_counter()
                run(inputs[turn % INPUTS])
                times.setdefault(name, []).append((time.perf_counter() - start) * 1e3)
            turn += 1
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    versions = f"torch {torch.__version__}"
    return {"cpu": cpu, "threads": str(torch.get_num_threads()), "versions": versions, "commit": commit, "date": str(datetime.date.today())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 1024])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=4.0, help="per cell, all contestants together")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for shape in options.shapes:
        experts, top_k, hidden, inner = SHAPES[shape]
        router = RouterConfig(gate_dtype="input")  # as transformers has it
        config = MoEConfig(num_experts=experts, top_k=top_k, hidden_size=hidden, intermediate_size=inner, router=router)
        for dtype in options.dtypes:
            weights = random_weights(config, DTYPES[dtype])
            for tokens in options.tokens:
                cell = time_cell(config, weights, tokens, DTYPES[dtype], options.seconds)
                if not rows:
                    print(json.dumps(machine()))
                    print("| shape | dtype | tokens | " + " | ".join(cell) + " | best other / moe_fn compiled |")
                    print("|---|---|--:|" + "--:|" * (len(cell) + 1))
                rows.append({"shape": shape, "dtype": dtype, "tokens": tokens, "milliseconds": cell})
                best_other = min(value for name, value in cell.items() if not name.startswith("moe_fn"))
                figures = " | ".join(f"{value:.2f}" for value in cell.values())
                print(f"| {shape} | {dtype} | {tokens} | {figures} | {best_other / cell['moe_fn compiled']:.2f} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
