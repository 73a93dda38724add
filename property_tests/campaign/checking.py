"""Checks one problem: output, laws and gradients, and the line of results that is stored."""

import dataclasses
import math
import traceback
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import moe_fn
from campaign.choices import has_logits_off_the_grid, leant, sums_may_tie, undecided
from campaign.drawing import problem_of
from campaign.features import Features, features_of, size_of
from campaign.gradients import GRADIENT_TOLERANCES, gradient_error
from campaign.laws import LAWS, forward, laws_of
from moe_fn.testing import MoEProblem
from moe_fn.testing.bounds import Bound, error_bound, logits_again
from moe_fn.testing.bounds.ball import Ball


@dataclass(frozen=True, kw_only=True)
class Line:
    """The results of one problem; `failures` are messages.

    of_bound   by law, the largest |y - float64| / radius of `error_bound`: at most 1; "the layer" is the layer itself
    error      rms(y - float64) / rms(float64); bound: the same of the radius; None if the output is empty or all zeros
    tied       codes of rounded inputs are undecided; unbounded: a division may be by zero, and there is no bound
    gradient   largest relative RMS error of a gradient (of size 0.1 at least); None if gradients were not computed
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
        """The line as JSON values."""
        return dataclasses.asdict(self)


def line_of_dict(values: dict[str, Any]) -> Line:
    """The inverse of `Line.to_dict`."""
    return Line(**(values | {"failures": tuple(values["failures"])}))


def check(seed: int, index: int) -> Line:
    """Returns the line of problem `index` of a seed."""
    problem = problem_of(seed, index)
    try:
        return check_problem(problem, seed, index)
    except Exception as error:  # an exception is a failure of the problem, and the campaign continues
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__} in {where.name}: {error}"
        return Line(seed=seed, index=index, features=features_of(problem), failures=(said[:600],))


def check_problem(problem: MoEProblem, seed: int = 0, index: int = 0) -> Line:
    """Returns the line of a problem; the index selects the laws."""
    judged = _judged(problem)
    expected, bound, failures = judged.expected, judged.bound, judged.failures
    y = forward(problem)
    apart = problem.config.as_op and problem.config.chunk_tokens is not None  # the gate gets one chunk at a time
    of_bound = {"the layer": share_of_bound(y, expected, judged.loose if apart else bound)}
    for name in laws_of(index):
        if LAWS[name].applies(problem):
            other = LAWS[name].output(problem)
            of_bound[name] = share_of_bound(other, expected, judged.loose)
            if LAWS[name].exact(problem) and not torch.equal(other, y):
                failures += (f"{name}: other bits",)
    failures += tuple(f"{name}: {share:.4g} of the bound" for name, share in of_bound.items() if not share <= 1)
    relative = _relative(bound.radius, expected)
    # they take as long as everything else
    asked = index % 2 == 0 and judged.decided and not bound.jumps and has_plain_gradients(problem)
    gradient = gradient_error(problem) if asked else None
    # what amplifies errors forward does so backward
    allowed = max(GRADIENT_TOLERANCES[problem.x.dtype], relative or 0.0)
    if gradient is not None and not gradient <= allowed:
        failures += (f"gradients: relative RMS error {gradient:.3g} > {allowed:.3g}",)
    return Line(
        seed=seed,
        index=index,
        features=features_of(problem),
        of_bound={name: _short(share) for name, share in of_bound.items()},
        error=_relative(y.to(torch.float64) - expected, expected),
        bound=relative,
        tied=bound.tied,
        unbounded=bool(bound.radius.isinf().any()),
        jumps=bound.jumps,
        gradient=None if gradient is None else _short(gradient),
        failures=failures,
    )


@dataclass(frozen=True)
class _Judged:
    """The expected output and its bounds; loose: the bound without tokens whose experts rounding decides."""

    expected: Tensor
    bound: Bound
    loose: Bound
    failures: tuple[str, ...]
    decided: bool  # for gradients


def _judged(problem: MoEProblem) -> _Judged:
    """Returns the expected output with its bounds, and the failures so far.

    A gate with normed or transformed inputs has logits off the grid, where rounding may correctly choose another
    expert. The layer is then checked in two parts: its logits against their bound, and the rest against the reference
    with these logits. The laws may have other logits and experts: they are checked for tokens whose choice is decided.
    """
    bound = error_bound(problem)
    logits, routing = problem.call(moe_fn.moe_route)
    failures, ids = _failures_of_logits(problem, logits, bound), routing.expert_ids.reshape(bound.expert_ids.shape)
    off, decided, open_ = has_logits_off_the_grid(problem), True, torch.zeros(len(ids), dtype=torch.bool)
    if off:
        open_ = undecided(problem, logits, 2 * bound.logits.radius)
        decided = (
            not bool(open_.any())
            and problem.x.dtype in (torch.float64, torch.float32)
            and torch.equal(ids, bound.expert_ids)
        )
        problem, bound = _with_logits(problem, logits)
        if not torch.equal(ids, bound.expert_ids):
            problem, bound = _with_logits(problem, leant(logits, routing.expert_ids))
    elif sums_may_tie(problem.config) and not torch.equal(ids, bound.expert_ids):
        decided, (problem, bound) = False, _leaning(problem, routing.expert_ids)
    expected: Tensor = problem.call(moe_fn.reference.moe_forward)
    if not torch.equal(ids, bound.expert_ids):
        failures += ("other experts than the reference",)
    radius = torch.where(open_.reshape(*problem.x.shape[:-1], 1), math.inf, bound.radius)
    loose = dataclasses.replace(bound, radius=radius)
    return _Judged(expected, bound, loose, failures + _failures_of_the_bound(bound, expected), decided)


def _with_logits(problem: MoEProblem, logits: Tensor) -> tuple[MoEProblem, Bound]:
    """Returns the problem with the logits of its gate as an argument, and the bound."""
    return problem.replace(logits=logits), error_bound(
        problem.replace(logits=logits), logits=logits_again(problem, logits)
    )


def _leaning(problem: MoEProblem, expert_ids: Tensor) -> tuple[MoEProblem, Bound]:
    """Returns the problem with logits that a few roundings have moved, and a bound that includes this move."""
    logits = problem.logits if problem.logits is not None else problem.call(moe_fn.moe_route)[0]
    leaning = leant(
        logits.to(torch.float32) if logits.dtype != torch.float64 else logits, expert_ids, least=16.0
    )  # of biased scores near 1
    ball = error_bound(problem.replace(logits=leaning)).logits
    changed = problem.replace(logits=leaning)
    return changed, error_bound(
        changed, logits=Ball(ball.value, ball.radius + 2 * (leaning - logits).abs().reshape(ball.value.shape))
    )


def has_plain_gradients(problem: MoEProblem) -> bool:
    """Whether gradients can be compared with a tolerance: inputs are not rounded to codes, and too small to saturate
    sigmoids.
    """
    rounds = problem.config.quant is not None and problem.config.quant.activations is not None
    return not rounds and size_of(problem.x) != "large"


def share_of_bound(y: Tensor, expected: Tensor, bound: Bound) -> float:
    """Returns the largest |y - expected| / radius; infinite for NaN.

    The reference may differ from `value`, so this difference is allowed too.
    """
    if y.numel() == 0:
        return 0.0
    error, allowed = (y.to(torch.float64) - expected).abs(), bound.radius + (expected - bound.value).abs()
    share = torch.where(error == 0, 0.0, error / allowed).nan_to_num(nan=math.inf)
    return float(share.max())


def _failures_of_the_bound(bound: Bound, expected: Tensor) -> tuple[str, ...]:
    """Compares the reference with the bound's own float64 computation, except for codes undecided in float64."""
    if expected.numel() == 0 or bound.tied:
        return ()
    off, size = (expected - bound.value).abs(), float(expected.abs().max())
    allowed = 1e-10 * max(size, 0.1)
    return (
        (f"the bound's value is off the reference by {float(off.max()):.3g}",)
        if not float(off.max()) <= allowed
        else ()
    )


def _failures_of_logits(problem: MoEProblem, logits: Tensor, bound: Bound) -> tuple[str, ...]:
    real = (
        torch.ones(len(bound.expert_ids), dtype=torch.bool)
        if problem.token_mask is None
        else problem.token_mask.flatten()
    )
    off = (logits.reshape(bound.logits.value.shape).to(torch.float64) - bound.logits.value).abs()[real]
    return () if bool((off <= bound.logits.radius[real]).all()) else ("logits of the gate are beyond their bound",)


def _relative(error: Tensor, expected: Tensor) -> float | None:
    size = float(expected.square().mean().sqrt()) if expected.numel() else 0.0
    return _short(float(error.square().mean().sqrt()) / size) if size else None


def _short(value: float) -> float:
    return float(f"{value:.4g}")
