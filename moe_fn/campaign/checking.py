"""What is asked of one problem, and the line that is kept of it."""

import dataclasses
import math
import traceback
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import moe_fn
from moe_fn.campaign.bounds import Bound, error_bound
from moe_fn.campaign.drawing import problem_of
from moe_fn.campaign.features import Features, features_of
from moe_fn.campaign.gradients import GRADIENT_TOLERANCES, gradient_error
from moe_fn.campaign.laws import LAWS, forward, laws_of
from moe_fn.testing import MoEProblem


@dataclass(frozen=True, kw_only=True)
class Line:
    """One problem: how large its errors are, and what failed, in words; failures are empty where all is well.

    of_bound   by law, the largest |y - float64| / radius of `error_bound`: at most 1; "the layer" is the layer itself
    error      rms(y - float64) / rms(float64), and bound the same of the radius; None where nothing, or only zeros, came out
    tied       codes of rounded inputs were undecided, and unbounded: a division may be by zero, and nothing can be said
    gradient   largest relative RMS error of a gradient (of size 0.1 at least), None where none was asked for
    """

    seed: int
    index: int
    features: Features
    of_bound: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    bound: float | None = None
    tied: bool = False
    unbounded: bool = False
    jumps: bool = False
    gradient: float | None = None
    failures: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)


def line_of_dict(values: dict[str, Any]) -> Line:
    """The inverse of `Line.to_dict`."""
    return Line(**(values | {"failures": tuple(values["failures"])}))


def check(seed: int, index: int) -> Line:
    """Everything about problem `index` of a seed."""
    problem = problem_of(seed, index)
    try:
        return check_problem(problem, seed, index)
    except Exception as error:  # a problem that raises is a finding, and the campaign goes on
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__} in {where.name}: {error}"
        return Line(seed=seed, index=index, features=features_of(problem), failures=(said[:600],))


def check_problem(problem: MoEProblem, seed: int = 0, index: int = 0) -> Line:
    """The line of a problem, whose laws are those of an index."""
    expected: Tensor = problem.call(moe_fn.reference.moe_forward)
    bound = error_bound(problem)
    failures = _failures_of_the_bound(bound, expected) + _failures_of_routing(problem, bound)
    y = forward(problem)
    of_bound = {"the layer": share_of_bound(y, expected, bound)}
    for name in laws_of(index):
        if LAWS[name].applies(problem):
            other = LAWS[name].output(problem)
            of_bound[name] = share_of_bound(other, expected, bound)
            if name == "again" and not torch.equal(other, y):
                failures += ("again: other bits",)
    failures += tuple(f"{name}: {share:.4g} of the bound" for name, share in of_bound.items() if not share <= 1)
    asked = index % 2 == 0 and not bound.jumps and not _rounds_inputs(problem)  # they take as long as all the rest
    gradient = gradient_error(problem) if asked else None
    if gradient is not None and not gradient <= GRADIENT_TOLERANCES[problem.x.dtype]:
        failures += (f"gradients: relative RMS error {gradient:.3g} > {GRADIENT_TOLERANCES[problem.x.dtype]:.3g}",)
    return Line(
        seed=seed,
        index=index,
        features=features_of(problem),
        of_bound={name: _short(share) for name, share in of_bound.items()},
        error=_relative(y.to(torch.float64) - expected, expected),
        bound=_relative(bound.radius, expected),
        tied=bound.tied,
        unbounded=bool(bound.radius.isinf().any()),
        jumps=bound.jumps,
        gradient=None if gradient is None else _short(gradient),
        failures=failures,
    )


def share_of_bound(y: Tensor, expected: Tensor, bound: Bound) -> float:
    """The largest |y - expected| / radius; infinite for NaN. The reference may itself be off `value`, so what it is off is allowed too."""
    if y.numel() == 0:
        return 0.0
    error, allowed = (y.to(torch.float64) - expected).abs(), bound.radius + (expected - bound.value).abs()
    share = torch.where(error == 0, 0.0, error / allowed).nan_to_num(nan=math.inf)
    return float(share.max())


def _failures_of_the_bound(bound: Bound, expected: Tensor) -> tuple[str, ...]:
    """The reference and the bound's own float64 computation are the same, but for codes that are undecided even in float64."""
    if expected.numel() == 0 or bound.tied:
        return ()
    off, size = (expected - bound.value).abs(), float(expected.abs().max())
    allowed = 1e-10 * max(size, 0.1)
    return (f"the bound's value is off the reference by {float(off.max()):.3g}",) if not float(off.max()) <= allowed else ()


def _failures_of_routing(problem: MoEProblem, bound: Bound) -> tuple[str, ...]:
    """Logits within their bound; choices those of the reference on the layer's own logits, for which others are a choice of their own."""
    logits, routing = problem.call(moe_fn.moe_route)
    ids = routing.expert_ids.reshape(bound.expert_ids.shape)
    real = torch.ones(len(ids), dtype=torch.bool) if problem.token_mask is None else problem.token_mask.flatten()
    off = (logits.reshape(bound.logits.value.shape).to(torch.float64) - bound.logits.value).abs()[real]
    failures: tuple[str, ...] = () if bool((off <= bound.logits.radius[real]).all()) else ("logits of the gate are beyond their bound",)
    if torch.equal(ids, bound.expert_ids):
        return failures
    mine = moe_fn.reference.route(problem.config, problem.weights, logits, token_ids=problem.token_ids, token_mask=problem.token_mask)
    said = "near tie of the gate's logits" if torch.equal(ids, mine.expert_ids) else "other experts than the reference"
    return (*failures, said)


def _rounds_inputs(problem: MoEProblem) -> bool:
    return problem.config.quant is not None and problem.config.quant.activations is not None


def _relative(error: Tensor, expected: Tensor) -> float | None:
    size = float(expected.square().mean().sqrt()) if expected.numel() else 0.0
    return _short(float(error.square().mean().sqrt()) / size) if size else None


def _short(value: float) -> float:
    return float(f"{value:.4g}")
