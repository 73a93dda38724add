"""One model in one dtype with one number of threads: every contestant built, checked and timed at every number of tokens."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, median
from typing import Any, Literal

import torch
from torch import Tensor

from moe_fn.bench.checking import TOLERANCE, Expected, expected_of, relative_error
from moe_fn.bench.contestants.entry import Contestant, Layer
from moe_fn.bench.floor import Reader, gemm_rates, product_flops, read_bytes, reader_of_device
from moe_fn.bench.machine import available_bytes
from moe_fn.bench.models import Model
from moe_fn.bench.problem import DTYPES, Part, Problem, TokenInput, distinct_experts, problem_of_model, token_inputs, weight_bytes
from moe_fn.bench.timing import Run, take_turns, timer_of_device

SPARE_BYTES = 2 * 10**9  # for activations, and for the check
FLOOR = "floor"  # takes its turn like a contestant
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Combination:
    """What one process times. seconds: for each number of tokens, all contestants together."""

    model: Model
    dtype: str
    device: str
    threads: int
    part: Part
    backward: bool
    tokens: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a contestant at one number of tokens. Milliseconds if timed; error is relative, and of y or x's gradient."""

    status: Literal["timed", "wrong", "failed", "refused"]
    reason: str | None = None
    error: float | None = None
    median_ms: float | None = None
    least_ms: float | None = None
    turns: int = 0


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of tokens. read_ms: median time to read bytes; both of the experts that the inputs visit, distinct_experts on average."""

    tokens: int
    distinct_experts: float
    bytes: float
    read_ms: float
    flops: float
    outcomes: dict[str, Outcome]


@dataclass(frozen=True, kw_only=True)
class Result:
    """A combination's cells. gemm_gflops: what each probe of the GEMM rate said, one number a cell; read_with: what read memory."""

    combination: Combination
    gemm_gflops: dict[str, tuple[float, ...]]
    read_with: str
    cells: tuple[Cell, ...]
    failure: str | None = None


def run_combination(combination: Combination, rows: tuple[Contestant, ...], say: Say) -> Result:
    """Everything about one combination. rows are installed contestants; say is told what is being done."""
    torch.set_num_threads(combination.threads)
    dtype, device = DTYPES[combination.dtype], torch.device(combination.device)
    say("weights")
    problem = problem_of_model(combination.model, dtype, device, combination.threads, combination.part, combination.backward)
    reader = reader_of_device(device, int(read_bytes(problem.config, problem.config.num_experts, dtype, problem.backward)))
    layers: dict[str, Layer | Outcome] = {}
    rates: dict[str, list[float]] = {}
    cells = []
    for tokens in combination.tokens:
        for name, rate in gemm_rates(dtype, device).items():
            rates.setdefault(name, []).append(rate)
        for row in rows:
            if row.name not in layers and row.refuses(problem, tokens) is None:
                say(f"{tokens} tokens: building {row.name}")
                layers[row.name] = _built(row, problem)
        cells.append(_cell(combination, problem, rows, layers, reader, tokens, say))
    return Result(
        combination=combination,
        gemm_gflops={name: tuple(values) for name, values in rates.items()},
        read_with=reader.name,
        cells=tuple(cells),
    )


def needed_bytes(combination: Combination) -> int:
    """Memory that the weights take, and their gradients."""
    return (3 if combination.backward else 1) * weight_bytes(combination.model.config, DTYPES[combination.dtype])


def _built(row: Contestant, problem: Problem) -> Layer | Outcome:
    needed, available = row.copies * weight_bytes(problem.config, problem.dtype), available_bytes()
    if problem.device.type == "cpu" and available is not None and needed > available - SPARE_BYTES:
        return Outcome(status="refused", reason=f"would take {needed / 1e9:.1f} GB for its weights; {available / 1e9:.1f} GB are free")
    try:
        return row.build(problem)
    except Exception as error:  # another package's: whatever it is, the others go on
        return _failed(error)


def _failed(error: Exception) -> Outcome:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return Outcome(status="failed", reason=f"{type(error).__name__}: {lines[0][:200] if lines else ''}")


def _cell(
    combination: Combination,
    problem: Problem,
    rows: tuple[Contestant, ...],
    layers: dict[str, Layer | Outcome],
    reader: Reader,
    tokens: int,
    say: Say,
) -> Cell:
    torch._dynamo.reset()  # each number of tokens gets a graph of its own, for everybody who is compiled
    inputs = token_inputs(problem, tokens)
    expected = expected_of(problem, inputs[0])
    outcomes: dict[str, Outcome] = {}
    runs: dict[str, Callable[[int], Run]] = {}
    with torch.set_grad_enabled(problem.backward):
        for row in rows:
            say(f"{tokens} tokens: checking {row.name}")
            refusal, layer = row.refuses(problem, tokens), layers.get(row.name)
            if refusal is not None or layer is None:
                outcomes[row.name] = Outcome(status="refused", reason=refusal)
            elif isinstance(layer, Outcome):
                outcomes[row.name] = layer
            else:
                outcomes[row.name] = _checked(layer, inputs[0], expected, problem.dtype)
                if outcomes[row.name].status == "timed":
                    runs[row.name] = _run_of_turn(tuple(_step(layer, token_input) for token_input in inputs))
        distinct = [distinct_experts(token_input) for token_input in inputs]
        num_bytes = [read_bytes(problem.config, count, problem.dtype, problem.backward) for count in distinct]
        say(f"{tokens} tokens: timing {len(runs)} contestants")
        runs[FLOOR] = lambda turn: reader.run_of_turn(turn, int(num_bytes[turn % len(num_bytes)]))
        times = take_turns(runs, timer_of_device(problem.device), combination.seconds, len(inputs))
    for name, values in times.items():
        if name != FLOOR:
            outcomes[name] = dataclasses.replace(
                outcomes[name], median_ms=median(values), least_ms=min(values), turns=len(values)
            )  # fmt: skip
    return Cell(
        tokens=tokens,
        distinct_experts=mean(distinct),
        bytes=mean(num_bytes),
        read_ms=median(times[FLOOR]),
        flops=product_flops(problem.config, tokens, problem.backward),
        outcomes=outcomes,
    )


def _run_of_turn(steps: tuple[Callable[[], tuple[Tensor, ...]], ...]) -> Callable[[int], Run]:
    return lambda turn: steps[turn % len(steps)]


def _step(layer: Layer, token_input: TokenInput) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: (y,), or with gradients (y, gradient of x, of every leaf) of sum(y * grad)."""
    forward = layer.bind(token_input)
    x, grad = token_input.x, token_input.grad
    if grad is None:
        return lambda: (forward(),)

    def step() -> tuple[Tensor, ...]:
        y = forward()
        return (y, *torch.autograd.grad(y, (x, *layer.leaves), grad))

    return step


def _checked(layer: Layer, token_input: TokenInput, expected: Expected, dtype: torch.dtype) -> Outcome:
    try:
        actual = _step(layer, token_input)()
    except Exception as error:  # as in _built
        return _failed(error)
    errors = {"y": relative_error(actual[0], expected.y)}
    if expected.x_grad is not None:
        errors["the gradient of x"] = relative_error(actual[1], expected.x_grad)
    what = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    if errors[what] <= TOLERANCE[dtype]:
        return Outcome(status="timed", error=errors[what])
    reason = f"{what} is {errors[what]:.1e} from the reference; expected at most {TOLERANCE[dtype]:.0e}"
    return Outcome(status="wrong", error=errors[what], reason=reason)


def result_as_json(result: Result) -> dict[str, Any]:
    """Plain values."""
    values: dict[str, Any] = dataclasses.asdict(result)
    combination: dict[str, Any] = values.pop("combination")
    model = result.combination.model
    return combination | {"model": model.name, "config": model.config.to_dict(), "biases": model.biases} | values
