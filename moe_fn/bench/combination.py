"""Benchmark of one combination of model, dtype and threads: builds, checks and times every contestant at every number
of tokens.
"""

import dataclasses
import math
from collections.abc import Callable
from statistics import mean, median

import torch
from torch import Tensor

from moe_fn.bench.checking import Expected, expected_of, relative_error, tolerance_of
from moe_fn.bench.clock import Clock, Run
from moe_fn.bench.contestants.entry import Contestant, Layer, takes_part
from moe_fn.bench.floor import gemm_rates, product_flops, read_bytes, reader_of_device
from moe_fn.bench.machine import available_bytes
from moe_fn.bench.memory import memory_of_step
from moe_fn.bench.problem import (
    DTYPES,
    Problem,
    TokenInput,
    distinct_experts,
    problem_of_model,
    step_bytes,
    token_inputs,
    weight_bytes,
)
from moe_fn.bench.quants import QUANTS
from moe_fn.bench.reader import Reader
from moe_fn.bench.results import Cell, Combination, Outcome, Result
from moe_fn.bench.timing import METHODS, clock_of_device, percentile, take_turns

SPARE_BYTES = 2 * 10**9  # memory kept free for activations and for the check
FLOOR, LAUNCH = "floor", "launch"  # timed in turns like contestants
Say = Callable[[str], None]


def run_combination(combination: Combination, rows: tuple[Contestant, ...], say: Say) -> Result:
    """The result of one combination. rows: installed contestants; say: receives progress messages."""
    torch.set_num_threads(combination.threads)
    quant = QUANTS[combination.quant]
    rows = tuple(row for row in rows if takes_part(row, quant))
    dtype, device = DTYPES[combination.dtype], torch.device(combination.device)
    say("weights")
    problem = problem_of_model(
        combination.model, dtype, device, combination.threads, combination.part, combination.backward, quant
    )
    reader = reader_of_device(
        device, int(read_bytes(problem.config, problem.config.num_experts, dtype, problem.backward))
    )
    layers: dict[str, Layer | Outcome] = {}
    rates: dict[str, list[float]] = {}
    left_out: dict[int, str] = {}
    cells = []
    for tokens in combination.tokens:
        if (reason := _no_room(problem, tokens)) is not None:
            left_out[tokens] = reason
            continue
        for name, rate in gemm_rates(dtype, device, quant).items():
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
        method=METHODS[device.type],
        left_out=left_out,
    )


def needed_bytes(combination: Combination) -> int:
    """Bytes of the weights, and of their gradients; twice the codes, while those of each expert are concatenated."""
    copies = 3 if combination.backward else 1 if combination.quant == "none" else 2
    return copies * weight_bytes(combination.config, DTYPES[combination.dtype])


def _no_room(problem: Problem, tokens: int) -> str | None:
    """Why this number of tokens does not fit into a GPU's memory, or None; not checked on a CPU."""
    needed = step_bytes(problem.config, tokens, problem.dtype, problem.backward)
    available = available_bytes(problem.device)
    if problem.device.type == "cpu" or available is None or needed <= available:
        return None
    return f"takes about {needed / 1e9:.0f} GB besides the weights; {available / 1e9:.0f} GB are free"


def _built(row: Contestant, problem: Problem) -> Layer | Outcome:
    floats = dataclasses.replace(problem.config, quant=None)
    needed = row.copies * weight_bytes(problem.config, problem.dtype) + row.copies_of_floats * weight_bytes(
        floats, problem.dtype
    )
    available = available_bytes(problem.device)
    if available is not None and needed > available - SPARE_BYTES:
        return Outcome(
            status="refused",
            reason=f"would take {needed / 1e9:.1f} GB for its weights; {available / 1e9:.1f} GB are free",
        )
    try:
        return row.build(problem)
    except ImportError as error:  # a dependency of an installed contestant is missing
        return Outcome(status="refused", reason=f"not installed: {_first_line(error)}")
    except Exception as error:  # any error of another package: the other contestants go on
        return _failed(error)


def _failed(error: Exception) -> Outcome:
    return Outcome(status="failed", reason=_first_line(error))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _cell(
    combination: Combination,
    problem: Problem,
    rows: tuple[Contestant, ...],
    layers: dict[str, Layer | Outcome],
    reader: Reader,
    tokens: int,
    say: Say,
) -> Cell:
    torch._dynamo.reset()  # compiled contestants get a graph for each number of tokens
    clock, inputs = clock_of_device(problem.device), token_inputs(problem, tokens)
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
                outcomes[row.name], ready = _checked(layer, inputs, expected, tolerance_of(problem), clock)
                if ready:
                    runs[row.name] = _run_of_turn(ready)
        distinct = [distinct_experts(token_input) for token_input in inputs]
        num_bytes = [read_bytes(problem.config, count, problem.dtype, problem.backward) for count in distinct]
        say(f"{tokens} tokens: timing {len(runs)} contestants")
        runs[FLOOR] = lambda turn: reader.run_of_turn(turn, int(num_bytes[turn % len(num_bytes)]))
        if (launch := clock.launch) is not None:
            runs[LAUNCH] = lambda turn: launch
        built = {name: layer for name, layer in layers.items() if isinstance(layer, Layer)}
        rests = {name: layer.rest_ms for name, layer in built.items() if layer.rest_ms}
        times = take_turns(runs, clock.time, combination.seconds, len(inputs), rests)
    return Cell(
        tokens=tokens,
        distinct_experts=mean(distinct),
        bytes=mean(num_bytes),
        read_ms=median(times[FLOOR]) * reader.share(mean(num_bytes)),
        flops=product_flops(problem.config, tokens, problem.backward),
        outcomes={name: _timed(outcome, times.get(name)) for name, outcome in outcomes.items()},
        launch_ms=median(times[LAUNCH]) if LAUNCH in times else None,
    )


def _timed(outcome: Outcome, values: tuple[float, ...] | None) -> Outcome:
    if values is None:
        return outcome
    return dataclasses.replace(
        outcome,
        median_ms=median(values),
        least_ms=min(values),
        p10_ms=percentile(values, 10),
        p90_ms=percentile(values, 90),
        turns=len(values),
    )


def _run_of_turn(steps: tuple[Callable[[], tuple[Tensor, ...]], ...]) -> Callable[[int], Run]:
    return lambda turn: steps[turn % len(steps)]


def _step(layer: Layer, token_input: TokenInput) -> Callable[[], tuple[Tensor, ...]]:
    """The timed function: returns (y,), or with gradients (y, gradients of sum(y * grad) in x and every leaf)."""
    forward = layer.bind(token_input)
    x, grad = token_input.x, token_input.grad
    if grad is None:
        return lambda: (forward(),)

    def step() -> tuple[Tensor, ...]:
        y = forward()
        return (y, *torch.autograd.grad(y, (x, *layer.leaves), grad))

    return step


def _checked(
    layer: Layer, inputs: tuple[TokenInput, ...], expected: Expected, tolerance: float, clock: Clock
) -> tuple[Outcome, tuple[Run, ...]]:
    """The outcome of a contestant's check, of a plain call and of one as timed; the calls to time, none if wrong."""
    try:
        steps = tuple(_step(layer, token_input) for token_input in inputs)
        outcome = _judged(steps[0](), expected, tolerance)
        if outcome.status != "timed":
            return outcome, ()
        memory = None
        if (grad := inputs[0].grad) is not None:
            memory = memory_of_step(inputs[0].x, grad, layer.leaves, layer.bind(inputs[0]))
        ready = clock.ready(steps)
        if ready.outputs is not None:
            ready.runs[0]()
            outcome = _judged(ready.outputs, expected, tolerance)
    except Exception as error:  # as in _built
        return _failed(error), ()
    outcome = dataclasses.replace(outcome, how=ready.how, why=ready.reason, memory=memory)
    return outcome, ready.runs if outcome.status == "timed" else ()


def _judged(actual: tuple[Tensor, ...], expected: Expected, tolerance: float) -> Outcome:
    errors = {"y": relative_error(actual[0], expected.y, expected.worst)}
    if expected.x_grad is not None:
        errors["the gradient of x"] = relative_error(actual[1], expected.x_grad, expected.worst)
    what = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    if errors[what] <= tolerance:
        return Outcome(status="timed", error=errors[what])
    reason = f"{what} is {errors[what]:.1e} from the reference; expected at most {tolerance:.0e}"
    return Outcome(status="wrong", error=errors[what], reason=reason)
