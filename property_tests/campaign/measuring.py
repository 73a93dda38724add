"""Measurements of errors and bounds beyond random small problems: at the widths of models, and over ranks."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import moe_fn
from campaign.drawing import DTYPES
from moe_fn.config import ActivationQuantConfig, MoEConfig, QuantConfig
from moe_fn.config.activation import PRESETS
from moe_fn.testing import MoEProblem, weights_for
from moe_fn.testing.bounds import error_bound

WIDTHS = (64, 256, 1024)
_BASE = MoEConfig(num_experts=4, top_k=2, hidden_size=256, intermediate_size=128)
_PROBLEMS = 4


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Numbers of some problems: median and worst relative RMS error against float64, median of the bounds, worst share
    of the bound.
    """

    what: str
    dtype: str
    problems: int
    median: float
    worst: float
    bound: float
    share: float

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        return dataclasses.asdict(self)


def quant_of(scheme: str, inputs: str | None) -> QuantConfig:
    """Returns a common config of a scheme, with inputs rounded to `inputs`."""
    fixed = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16, "int4": 32}.get(scheme)
    groups = {"mxfp8": 32, "mxfp4": 32, "nvfp4": 16}
    size = None if inputs is None else groups.get(inputs)
    granularity = "token" if size is None else "group"
    activations = None
    if inputs is not None:
        activations = ActivationQuantConfig(scheme=inputs, granularity=granularity, group_size=size)  # type: ignore[arg-type]
    return QuantConfig(
        scheme=scheme,  # type: ignore[arg-type]
        granularity="group" if fixed else "channel",
        group_size=fixed,
        activations=activations,
    )


def wide_configs() -> Iterator[tuple[str, MoEConfig]]:
    """Yields (what is measured, config)."""
    for width in WIDTHS:
        yield f"width {width}", dataclasses.replace(_BASE, hidden_size=width, intermediate_size=width // 2)
    for name in PRESETS:
        yield f"activation {name}", dataclasses.replace(_BASE, activation=name)  # type: ignore[arg-type]
    every = (
        ("fp8_e4m3", "fp8_e4m3"),
        ("int8", "int8"),
        ("int4", "int8"),
        ("mxfp4", "mxfp4"),
        ("mxfp8", "mxfp8"),
        ("nvfp4", "nvfp4"),
    )
    for scheme, inputs in every:
        for rounded in (None, inputs):
            words = f"{scheme}, inputs {rounded or 'not rounded'}"
            yield f"codes {words}", dataclasses.replace(_BASE, quant=quant_of(scheme, rounded))


def problem_for(config: MoEConfig, dtype: torch.dtype, seed: int, tokens: int = 2) -> MoEProblem:
    """Returns a problem with normal inputs and logits, and weights with standard deviation 1/sqrt(fan in)."""
    generator = torch.Generator().manual_seed(seed)
    weights = weights_for(config, generator, dtype=dtype)
    x, logits = (torch.randn(tokens, width, generator=generator) for width in (config.hidden_size, config.num_logits))
    return MoEProblem(config=config, weights=weights, x=x.to(dtype), logits=logits.to(dtype))


def measured(what: str, dtype: str, found: list[tuple[float, float, float]]) -> Measured:
    """Returns the numbers of problems with these (error, bound, share)."""
    errors, bounds, shares = (sorted(column) for column in zip(*found, strict=True))
    middle = len(errors) // 2
    return Measured(
        what=what,
        dtype=dtype,
        problems=len(errors),
        median=errors[middle],
        worst=errors[-1],
        bound=bounds[middle],
        share=shares[-1],
    )


def compare(y: Tensor, problem: MoEProblem, ranks: int = 1) -> tuple[float, float, float]:
    """Returns relative RMS error, relative RMS bound and largest share of the bound of one output."""
    bound = error_bound(problem, ranks)
    error = y.detach().to(torch.float64) - bound.value
    if not y.numel():
        return 0.0, 0.0, 0.0
    size = float(bound.value.square().mean().sqrt())
    shares = torch.where(error == 0, 0.0, error.abs() / bound.radius)
    return (
        float(error.square().mean().sqrt()) / size,
        float(bound.radius.square().mean().sqrt()) / size,
        float(shares.max()),
    )


def measure_wide() -> list[Measured]:
    """Measures every layer of `wide_configs` in every dtype."""
    found = []
    for (what, config), (name, dtype) in itertools.product(wide_configs(), DTYPES.items()):
        problems = [problem_for(config, dtype, seed) for seed in range(_PROBLEMS)]
        found.append(measured(what, name, [compare(problem.call(moe_fn.moe_forward), problem) for problem in problems]))
    return found
