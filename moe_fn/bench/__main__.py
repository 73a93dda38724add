"""python -m moe_fn.bench: times implementations of a Mixture-of-Experts layer on this machine.

For each model, dtype and number of threads, every contestant is compared with the reference; then contestants take
turns, with inputs (and so a routing) that change from call to call. Prints medians, the share of the machine's floor
(the least time that bandwidth and arithmetic allow), and the time of the best other contestant over that of moe_fn. On
a GPU (--device cuda) calls are replays of CUDA graphs with a cold cache; a * marks contestants that cannot be captured.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from moe_fn.bench.combination import needed_bytes, run_combination
from moe_fn.bench.contestants import CONTESTANTS, contestants_of_device, contestants_of_names
from moe_fn.bench.contestants.entry import Contestant, missing
from moe_fn.bench.machine import available_bytes, load_average, machine
from moe_fn.bench.models import MODELS, Model, model_of_name, model_of_shape
from moe_fn.bench.problem import DTYPES, weight_bytes
from moe_fn.bench.quants import QUANTS, check_quant
from moe_fn.bench.report import as_json, machine_line, markdown
from moe_fn.bench.results import Combination, Result
from moe_fn.checkpoint.progress import Progress, clear

Value = TypeVar("Value")


def main(arguments: list[str] | None = None, table: tuple[Contestant, ...] = CONTESTANTS) -> int:
    """Runs the command; returns 1 if a result was wrong or a combination failed, 2 if the device is missing, else 0."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.list:
        print(_listing(table))
        return 0
    try:
        _check(options)
        chosen = contestants_of_names(options.contestants, contestants_of_device(options.device, table))
        combinations = _combinations(options)
    except ValueError as error:
        parser.error(str(error))
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"--device {options.device}: torch {torch.__version__} finds no GPU", file=sys.stderr)
        return 2
    absent = {row.name: reason for row in chosen if (reason := row.installed()) is not None}
    rows = tuple(row for row in chosen if row.name not in absent)
    for name, reason in absent.items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    about = machine(torch.device(options.device), rows)
    if (load := load_average()) is not None and load > 0.5:
        print(f"load average {load}: other programs are running and will distort the times", file=sys.stderr)
    results = _results(combinations, rows, alone=len(combinations) == 1)
    clear()
    print(json.dumps(about))
    print(f"\n{machine_line(about)}\n\n{markdown(results, rows, absent)}")
    if options.json is not None:
        values = {name: value.name if isinstance(value, Path) else value for name, value in vars(options).items()}
        options.json.write_text(json.dumps(as_json(results, rows, absent, about, values), indent=1) + "\n")
    if options.plot is not None:
        from moe_fn.bench.plot import plot

        plot(results, rows, options.plot)
    wrong = any(
        outcome.status == "wrong" for result in results for cell in result.cells for outcome in cell.outcomes.values()
    )
    return int(wrong or any(result.failure is not None for result in results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moe_fn.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="names from --list, comma-separated; default qwen3-30b-a3b")
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        help="E,k,H,I: experts, top_k, hidden_size, intermediate_size; repeatable",
    )
    parser.add_argument("--tokens", default="1,4,16,64,256,1024", help="numbers of tokens, comma-separated")
    parser.add_argument("--dtype", default="bf16", help=f"some of {','.join(DTYPES)}")
    parser.add_argument("--quant", default="none", help=f"quantization of the experts, some of {','.join(QUANTS)}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--threads", default=str(torch.get_num_threads()), help="numbers of threads, comma-separated; default: torch's"
    )
    parser.add_argument(
        "--contestants",
        default="all",
        help='names from --list, comma-separated, or a first word ("transformers"), or all',
    )
    parser.add_argument(
        "--part", default="experts", choices=("experts", "layer"), help="ids and weights given, or router included"
    )
    parser.add_argument("--backward", action="store_true", help="forward, and gradients of x and of all weights")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="for each number of tokens, all together; at least 5 turns"
    )
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--plot", type=Path, help="draw time over tokens to this .png (needs matplotlib)")
    parser.add_argument("--list", action="store_true", help="print models and contestants, and stop")
    return parser


def _combinations(options: argparse.Namespace) -> tuple[Combination, ...]:
    names = options.model.split(",") if options.model else ([] if options.shape else ["qwen3-30b-a3b"])
    models: list[Model] = [model_of_name(name.strip()) for name in names] + [
        model_of_shape(text) for text in options.shape
    ]
    tokens = _parts("--tokens", options.tokens, _count)
    return tuple(
        Combination(
            model=model,
            dtype=dtype,
            device=options.device,
            threads=threads,
            part=options.part,
            backward=options.backward,
            tokens=tokens,
            seconds=options.seconds,
            quant=quant,
        )
        for model in models
        for dtype in _parts("--dtype", options.dtype, _dtype)
        for quant in _parts("--quant", options.quant, check_quant)
        for threads in _parts("--threads", options.threads, _count)
    )


def _parts(option: str, text: str, read: Callable[[str], Value]) -> tuple[Value, ...]:
    try:
        return tuple(read(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} {text}: {error}") from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("expected positive integers, separated by commas")
    return int(text)


def _dtype(text: str) -> str:
    if text not in DTYPES:
        raise ValueError(f"expected some of {', '.join(DTYPES)}, separated by commas")
    return text


def _check(options: argparse.Namespace) -> None:
    device = options.device.split(":")[0]
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device {options.device}: expected cpu or cuda")
    if options.backward and options.quant != "none":
        raise ValueError(f"--quant {options.quant} with --backward: expected none, since codes have no gradients")
    for option, path in (("--json", options.json), ("--plot", options.plot)):
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"{option} {path}: the folder does not exist")
    if options.plot is not None and (reason := missing("matplotlib")) is not None:
        raise ValueError(f"--plot {options.plot}: {reason}")


def _results(combinations: tuple[Combination, ...], rows: tuple[Contestant, ...], alone: bool) -> tuple[Result, ...]:
    results = []
    for done, combination in enumerate(combinations):
        where = f"{combination.threads} threads" if combination.device == "cpu" else combination.device
        quant = "" if combination.quant == "none" else f" {combination.quant}"
        label = f"{combination.model.name}{quant} {combination.dtype} {where}"
        progress = Progress(total=len(combinations), done=done, label=label)
        needed, available = needed_bytes(combination), available_bytes(torch.device(combination.device))
        if available is not None and needed > available:
            more = " and gradients" if combination.backward else "" if combination.quant == "none" else ", quantized,"
            failure = f"left out: the weights{more} take {needed / 1e9:.1f} GB"
            failure += f"; {available / 1e9:.1f} GB of memory are free"
            results.append(_failure(combination, failure))
        else:
            results.append(_result(combination, rows, progress, alone))
    return tuple(results)


def _result(combination: Combination, rows: tuple[Contestant, ...], progress: Progress, alone: bool) -> Result:
    """The result of a combination, in a new process if there are several: some libraries cache weights by address."""
    try:
        if alone:
            return run_combination(combination, rows, progress.say)
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
            return pool.submit(run_combination, combination, rows, progress.say).result()
    except Exception as error:  # a killed process, no memory, an error during timing: the other combinations go on
        traceback.print_exception(error)
        return _failure(combination, f"failed: {type(error).__name__}: {error}")


def _failure(combination: Combination, reason: str) -> Result:
    return Result(combination=combination, gemm_gflops={}, read_with="", cells=(), failure=reason)


def _listing(table: tuple[Contestant, ...]) -> str:
    models = [
        f"  {model.name:22} E={c.num_experts:<4} k={c.top_k:<3} H={c.hidden_size:<5} I={c.intermediate_size:<6}"
        f"{c.activation!s:14} {weight_bytes(c, torch.bfloat16) / 1e9:6.2f} GB in bf16"
        for model in MODELS
        for c in (model.config,)
    ]
    contestants = [f"  {row.name:32} {', '.join(row.devices):10} {row.installed() or 'installed'}" for row in table]
    return "\n".join(["models", *models, "", "contestants", *contestants])


if __name__ == "__main__":
    sys.exit(main())
