"""torch.export and AOTInductor of a small model of transformers with moe_fn's layers. Needs
`pip install "moe_fn[transformers]"`.

    python examples/export.py [--model qwen3-moe|deepseek-v3|gpt-oss|mixtral] [--dtype float32|bfloat16]

The number of tokens is dynamic. Each form is saved, loaded in another process without transformers, run at other
lengths, and compared with the model. That process imports moe_fn, as the graph contains its ops.
"""

import argparse
import datetime
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import transformers
from small_models import MODELS, small_model
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from moe_fn.checkpoint.progress import Progress, clear
from moe_fn.integrations.transformers import replace_moe_blocks

LENGTHS = (1, 2, 100, 256)  # none of them is the length that was traced
TRACED = 16
TOKENS = Dim("tokens", min=1, max=2048)
TURNS = 5
NOTE = """The packages ran in another process, which imports torch and moe_fn (for the ops that the graph calls) but not
transformers. Differences are those of logits from the model's at {lengths} tokens, absolute and over the RMS of its
logits; ms are medians of {turns} calls at {last} tokens."""

# The code of that process: packages and inputs in; logits, seconds of loading and milliseconds of a call out, for each.
RUNNER = """
import statistics, sys, time
import torch
import moe_fn  # its ops are in the graph
inputs, outputs, turns, *packages = sys.argv[1:]

def load(kind, path):
    return torch.export.load(path).module() if kind == "export" else torch._inductor.aoti_load_package(path)

def measured(kind, path):
    start = time.perf_counter()
    run = load(kind, path)
    seconds = time.perf_counter() - start
    logits, times = [run(ids) for ids in torch.load(inputs)], []
    for _ in range(int(turns)):
        start = time.perf_counter()
        run(torch.load(inputs)[-1])
        times.append((time.perf_counter() - start) * 1e3)
    return logits, seconds, statistics.median(times)

with torch.no_grad():
    results = [measured(*package.split("=", 1)) for package in packages]
assert "transformers" not in sys.modules
torch.save(results, outputs)
"""


class Logits(nn.Module):
    """ids [1, T] -> logits [1, T, V], without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


@dataclass(frozen=True)
class Package:
    """A file with a program, and the time to make it."""

    name: str
    kind: str  # "export" or "aoti": how it is loaded
    path: Path
    seconds: float


def exported(model: nn.Module, vocabulary: int, strict: bool) -> ExportedProgram:
    return torch.export.export(
        Logits(model), (random_ids(TRACED, vocabulary),), dynamic_shapes={"ids": {1: TOKENS}}, strict=strict
    )


def random_ids(length: int, vocabulary: int) -> Tensor:
    return torch.randint(2, vocabulary, (1, length), generator=torch.Generator().manual_seed(length))


def packages(model: nn.Module, vocabulary: int, folder: Path, progress: Progress) -> list[Package]:
    """Returns the exported program, strict and non-strict, and the library that AOTInductor makes of it."""
    made = []
    for done, (name, strict) in enumerate((("torch.export, strict", True), ("torch.export", False))):
        replace(progress, done=done).say(name)
        start, path = time.perf_counter(), folder / f"strict_{strict}.pt2"
        program = exported(model, vocabulary, strict)
        torch.export.save(program, path)
        made.append(Package(name, "export", path, time.perf_counter() - start))
    print(
        "ops of moe_fn in the graph:", ", ".join(f"{count} x {name}" for name, count in ops_of_moe_fn(program).items())
    )
    replace(progress, done=2).say("AOTInductor")
    start, path = time.perf_counter(), folder / "library.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return [*made, Package("AOTInductor", "aoti", path, time.perf_counter() - start)]


def ops_of_moe_fn(program: ExportedProgram) -> Counter[str]:
    names = (str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return Counter(name.removesuffix(".default").replace(".", "::") for name in names if name.startswith("moe_fn."))


def run_elsewhere(made: list[Package], inputs: Path, outputs: Path) -> list[tuple[list[Tensor], float, float]]:
    """Returns logits, seconds of loading and milliseconds of a call of each package, measured in a new process."""
    packages = [f"{package.kind}={package.path}" for package in made]
    subprocess.run([sys.executable, "-c", RUNNER, str(inputs), str(outputs), str(TURNS), *packages], check=True)
    results: list[tuple[list[Tensor], float, float]] = torch.load(outputs)
    return results


def milliseconds_of(model: nn.Module, ids: Tensor) -> float:
    times = []
    for _ in range(TURNS):
        start = time.perf_counter()
        model(ids)
        times.append((time.perf_counter() - start) * 1e3)
    return median(times)


def compare(model: nn.Module, made: list[Package], inputs: list[Tensor], folder: Path, progress: Progress) -> None:
    wanted = [model(ids) for ids in inputs]
    torch.save(inputs, folder / "inputs.pt")
    print(
        "\n| | made and saved, s | MB | loaded, s | ms | largest logit difference | over their RMS "
        "|\n|---|--:|--:|--:|--:|--:|--:|"
    )
    print(f"| the model, eager | - | - | - | {milliseconds_of(model, inputs[-1]):.1f} | - | - |")
    replace(progress, done=3).say("running the packages in another process")
    results = run_elsewhere(made, folder / "inputs.pt", folder / "outputs.pt")
    for package, (logits, seconds, milliseconds) in zip(made, results, strict=True):
        differences = [
            (got.float() - want.float()).abs().max().item() for got, want in zip(logits, wanted, strict=True)
        ]
        relative = max(
            d / want.float().square().mean().sqrt().item() for d, want in zip(differences, wanted, strict=True)
        )
        size = package.path.stat().st_size / 1e6
        cells = (
            f"{package.seconds:.1f}",
            f"{size:.0f}",
            f"{seconds:.1f}",
            f"{milliseconds:.1f}",
            f"{max(differences):.1e}",
            f"{relative:.1e}",
        )
        print(f"| {package.name} | {' | '.join(cells)} |")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-moe")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tiny", action="store_true", help="a model that is small enough for a test")
    options, start = parser.parse_args(), time.perf_counter()
    model = small_model(options.model, getattr(torch, options.dtype), options.tiny)
    print(replace_moe_blocks(model))
    vocabulary = model.config.vocab_size
    progress = Progress(total=4, done=0, label=options.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = packages(model, vocabulary, folder, progress)
        compare(Logits(model), made, [random_ids(length, vocabulary) for length in LENGTHS], folder, progress)
    clear()
    print("\n" + NOTE.format(lengths=", ".join(map(str, LENGTHS)), turns=TURNS, last=LENGTHS[-1]))
    print(
        f"{options.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; "
        f"{datetime.date.today()}; {time.perf_counter() - start:.0f} s in all"
    )


if __name__ == "__main__":
    main()
