"""The cost of batch_invariant=True: CPU time of a call with it over one without, in turns, and whether bits are equal.

python examples/invariance.py [--tokens 1,16,256,1024]
"""

import argparse
import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

import moe_fn
from moe_fn import MoEConfig, MoEWeights, QuantConfig, Routing

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 32, 4, 2048, 768
INT8 = QuantConfig(scheme="int8", granularity="group", group_size=32)
ROWS: tuple[tuple[str, torch.dtype, Any, bool, QuantConfig | None], ...] = (
    ("bf16 prepared", torch.bfloat16, "out_in", True, None),
    ("bf16 plain", torch.bfloat16, "out_in", False, None),
    ("bf16 plain, [E, in, out]", torch.bfloat16, "in_out", False, None),
    ("f32 prepared", torch.float32, "out_in", True, None),
    ("f32 plain", torch.float32, "out_in", False, None),
    ("f32 plain, [E, in, out]", torch.float32, "in_out", False, None),
    ("int8 prepared, bf16 inputs", torch.bfloat16, "out_in", True, INT8),
)


def layer(dtype: torch.dtype, layout: Any, prepared: bool, quant: QuantConfig | None) -> tuple[MoEConfig, MoEWeights]:
    config = MoEConfig(
        num_experts=EXPERTS, top_k=TOP_K, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, weight_layout=layout
    )
    shapes = (EXPERTS, 2 * INTERMEDIATE, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE)
    gate_up, down = (
        torch.randn(shape if layout == "out_in" else (shape[0], shape[2], shape[1])).to(dtype) / 50 for shape in shapes
    )
    weights = MoEWeights(gate_up=gate_up, down=down)
    if quant is not None:
        config, weights = moe_fn.quantize_weights(config, weights, quant)
    return config, moe_fn.prepare_weights(config, weights) if prepared else weights


def seconds(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> tuple[float, Tensor]:
    start = time.process_time()
    y = moe_fn.moe_forward_routed(config, weights, x, routing)
    return time.process_time() - start, y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,4,16,64,256,1024")
    counts = [int(count) for count in parser.parse_args().tokens.split(",")]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(
        "| weights | "
        + " | ".join(f"{count} tokens" for count in counts)
        + " | bits |\n|---|"
        + "--:|" * len(counts)
        + "---|"
    )
    for name, *kind in ROWS:
        config, weights = layer(*kind)
        invariant, cells, same = dataclasses.replace(config, batch_invariant=True), [], True
        for count in counts:
            x = torch.randn(count, HIDDEN).to(kind[0])
            ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(count)])
            routing = Routing(expert_ids=ids, weights=torch.full((count, TOP_K), 1 / TOP_K))
            turns = [
                [seconds(c, weights, x, routing)[0] for c in (config, invariant)]
                for _ in range(10 if count < 100 else 5)
            ]
            plain, ours = (min(turn[place] for turn in turns) for place in (0, 1))
            cells.append(f"{ours / plain:.2f}")
            last = Routing(expert_ids=ids[-1:], weights=routing.weights[-1:])
            whole, alone = seconds(invariant, weights, x, routing)[1], seconds(invariant, weights, x[-1:], last)[1]
            same &= torch.equal(whole[-1:], alone)
        print(f"| {name} | " + " | ".join(cells) + f" | {'hold' if same else 'DIFFER'} |", flush=True)


if __name__ == "__main__":
    main()
