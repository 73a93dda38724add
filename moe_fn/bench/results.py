"""Records of the benchmark: combinations of layer, dtype and threads to time, and their results."""

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
    """The settings of one process. seconds: per number of tokens, for all contestants; quant: a name in QUANTS."""

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
        """The model's config with quantized experts."""
        return quantized_config(self.model.config, QUANTS[self.quant])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a contestant at one number of tokens, with milliseconds if timed.

    error     relative error of y or of x's gradient
    how, why  how it was timed, and why not as a graph, on a device that uses graphs
    memory    of a training step, where counted
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
    """Results for one number of tokens.

    distinct_experts, bytes  of the experts in the inputs' routings, means over the inputs
    read_ms                  median time to read these bytes
    launch_ms                least measurable time, a graph of one kernel on one value; None where it is 0
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
    """Results of a combination.

    gemm_gflops  rates of each probe, one value per cell
    read_with    how memory was read
    left_out     reasons for missing cells, by number of tokens
    """

    combination: Combination
    gemm_gflops: dict[str, tuple[float, ...]]
    read_with: str
    cells: tuple[Cell, ...]
    failure: str | None = None
    method: str = ""
    left_out: dict[int, str] = dataclasses.field(default_factory=dict)


def result_as_json(result: Result) -> dict[str, Any]:
    """The result as plain values."""
    values: dict[str, Any] = dataclasses.asdict(result)
    combination: dict[str, Any] = values.pop("combination")
    model = result.combination.model
    return (
        combination
        | {"model": model.name, "config": result.combination.config.to_dict(), "biases": model.biases}
        | values
    )
