"""What is to be timed, and what came of it."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from moe_fn.bench.clock import How
from moe_fn.bench.memory import Memory
from moe_fn.bench.models import Model
from moe_fn.bench.problem import Part
from moe_fn.bench.quants import QUANTS, quantized_config
from moe_fn.config import MoEConfig


@dataclass(frozen=True, kw_only=True)
class Combination:
    """What one process times. seconds: for each number of tokens, all contestants together; quant: a name in QUANTS."""

    model: Model
    dtype: str
    device: str
    threads: int
    part: Part
    backward: bool
    tokens: tuple[int, ...]
    seconds: float
    quant: str = "none"

    @property
    def config(self) -> MoEConfig:
        """The model's, its experts quantized as asked for."""
        return quantized_config(self.model.config, QUANTS[self.quant])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a contestant at one number of tokens. Milliseconds if timed; error is relative, and of y or x's
    gradient.

    how, why: the way it was timed, and why not as a graph, where that is the device's way; memory: of a training step,
    where counted.
    """

    status: Literal["timed", "wrong", "failed", "refused"]
    reason: str | None = None
    error: float | None = None
    median_ms: float | None = None
    least_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    turns: int = 0
    how: How | None = None
    why: str | None = None
    memory: Memory | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of tokens. read_ms: median time to read bytes; both of the experts that the inputs visit,
    distinct_experts on average.

    launch_ms: the least that can be timed, a graph of one kernel of one value; None where that is nothing.
    """

    tokens: int
    distinct_experts: float
    bytes: float
    read_ms: float
    flops: float
    outcomes: dict[str, Outcome]
    launch_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """A combination's cells. gemm_gflops: what each probe of the GEMM rate said, one number a cell; read_with: what
    read memory.

    left_out: why there is no cell, by number of tokens.
    """

    combination: Combination
    gemm_gflops: dict[str, tuple[float, ...]]
    read_with: str
    cells: tuple[Cell, ...]
    failure: str | None = None
    method: str = ""
    left_out: dict[int, str] = dataclasses.field(default_factory=dict)


def result_as_json(result: Result) -> dict[str, Any]:
    """Plain values."""
    values: dict[str, Any] = dataclasses.asdict(result)
    combination: dict[str, Any] = values.pop("combination")
    model = result.combination.model
    return (
        combination
        | {"model": model.name, "config": result.combination.config.to_dict(), "biases": model.biases}
        | values
    )
