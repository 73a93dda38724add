"""The effect of chunk_tokens on peak memory: a table of peaks above the weights and inputs, each measured in its own
process.

python examples/chunking.py [--tokens 16384]
"""

import argparse
import json
import resource
import subprocess
import sys

import torch

from moe_fn import MoEConfig, MoEWeights, moe_forward

CHUNKS = (None, 4096, 512)
MODES = ("forward", "forward + backward", "compiled forward", "compiled forward + backward")


def peak_megabytes(tokens: int, chunk_tokens: int | None, mode: str) -> float:
    """Returns the peak resident memory of one call, minus the memory before it.

    Must run in a new process, as a peak never decreases.
    """
    torch.set_num_threads(1)
    config = MoEConfig(num_experts=16, top_k=4, hidden_size=128, intermediate_size=512, chunk_tokens=chunk_tokens)
    backward = "backward" in mode
    weights = MoEWeights(
        gate_up=torch.randn(16, 1024, 128).mul_(0.1).requires_grad_(backward),
        down=torch.randn(16, 128, 512).mul_(0.05).requires_grad_(backward),
    )
    function = torch.compile(moe_forward, fullgraph=True) if "compiled" in mode else moe_forward

    def run(count: int) -> None:
        with torch.set_grad_enabled(backward):
            y = function(config, weights, torch.ones(count, 128), torch.randn(count, 16))
        if backward:
            y.square().mean().backward()

    for count in (640, 641):  # compiles, also for any number of tokens; so few do not affect the peak
        run(count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(tokens)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    # "[chunk_tokens, mode]": the measurement that the parent process requests
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(peak_megabytes(options.tokens, *json.loads(options.measure)))
        return
    print(f"peak MB above weights and inputs, {options.tokens} tokens, E=16 k=4 H=128 I=512, float32")
    print("| chunk_tokens | " + " | ".join(MODES) + " |")
    print("|---|" + "--:|" * len(MODES))
    for chunk in CHUNKS:
        cells = []
        for mode in MODES:
            command = [
                sys.executable,
                __file__,
                "--tokens",
                str(options.tokens),
                "--measure",
                json.dumps([chunk, mode]),
            ]
            cells.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        print(f"| {chunk} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
