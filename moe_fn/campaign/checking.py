"""What is asked of one problem, and the line that is kept of it."""

import dataclasses
import math
import traceback
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import moe_fn
from moe_fn.campaign.bounds import Bound, error_bound, logits_again
from moe_fn.campaign.drawing import problem_of
from moe_fn.campaign.features import Features, features_of, size_of
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
    expected, bound, failures, decided = _judged(problem)
    y = forward(problem)
    of_bound = {"the layer": share_of_bound(y, expected, bound)}
    for name in laws_of(index):
        if LAWS[name].applies(problem):
            other = LAWS[name].output(problem)
            of_bound[name] = share_of_bound(other, expected, bound)
            if LAWS[name].exact(problem) and not torch.equal(other, y):
                failures += (f"{name}: other bits",)
    failures += tuple(f"{name}: {share:.4g} of the bound" for name, share in of_bound.items() if not share <= 1)
    relative = _relative(bound.radius, expected)
    asked = index % 2 == 0 and decided and not bound.jumps and has_plain_gradients(problem)  # they take as long as all the rest
    gradient = gradient_error(problem) if asked else None
    allowed = max(GRADIENT_TOLERANCES[problem.x.dtype], relative or 0.0)  # what amplifies errors forward does so backward
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


def _judged(problem: MoEProblem) -> tuple[Tensor, Bound, tuple[str, ...], bool]:
    """What is expected, its bound, what is wrong so far, and whether the choice of experts was decided, for gradients.

    A gate that sees normed or transformed inputs has logits off the grid, where rounding may choose another expert, and be right. The layer
    is judged in two parts there: its logits by their bound, and the rest by what the reference makes of these logits.
    """
    bound = error_bound(problem)
    logits, routing = problem.call(moe_fn.moe_route)
    failures, decided, ids = _failures_of_logits(problem, logits, bound), True, routing.expert_ids.reshape(bound.expert_ids.shape)
    if has_logits_off_the_grid(problem):
        decided = problem.x.dtype in (torch.float64, torch.float32) and torch.equal(ids, bound.expert_ids)
        problem, bound = _with_logits(problem, logits)
        if not torch.equal(ids, bound.expert_ids):
            problem, bound = _with_logits(problem, leant(logits, routing.expert_ids))
    expected: Tensor = problem.call(moe_fn.reference.moe_forward)
    if not torch.equal(ids, bound.expert_ids):
        failures += ("other experts than the reference",)
    return expected, bound, failures + _failures_of_the_bound(bound, expected), decided


def _with_logits(problem: MoEProblem, logits: Tensor) -> tuple[MoEProblem, Bound]:
    """The problem with logits from outside, which the gate inside the layer has computed."""
    return problem.replace(logits=logits), error_bound(problem.replace(logits=logits), logits=logits_again(problem, logits))


def leant(logits: Tensor, expert_ids: Tensor) -> Tensor:
    """Logits a few roundings away, towards a choice: scores that tie but for rounding are then apart as the choice has it.

    >>> leant(torch.tensor([[1.0, 1.0]]), torch.tensor([[1]])).argmax(-1)
    tensor([1])
    """
    top_k, roundings = expert_ids.shape[-1], 2 * torch.finfo(logits.dtype).eps
    places = torch.arange(top_k, 0, -1, dtype=logits.dtype).expand(expert_ids.shape)
    steps = torch.zeros_like(logits).scatter(-1, expert_ids.clamp(min=0), torch.where(expert_ids >= 0, places, 0))
    return logits + steps * roundings * logits.abs().amax(-1, keepdim=True)


def has_logits_off_the_grid(problem: MoEProblem) -> bool:
    """Whether a gate inside the layer sees what was rounded before."""
    config = problem.config
    norms_input, norms_gate = (config.norms is not None and getattr(config.norms, name) for name in ("input", "gate"))
    transformed = config.router.gate_input == "transformed" and (config.latent is not None or norms_input)
    return problem.logits is None and (norms_gate or transformed)


def has_plain_gradients(problem: MoEProblem) -> bool:
    """Whether gradients can be held to a tolerance: inputs are not rounded to codes, and not so large that sigmoids saturate."""
    rounds = problem.config.quant is not None and problem.config.quant.activations is not None
    return not rounds and size_of(problem.x) != "large"


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


def _failures_of_logits(problem: MoEProblem, logits: Tensor, bound: Bound) -> tuple[str, ...]:
    real = torch.ones(len(bound.expert_ids), dtype=torch.bool) if problem.token_mask is None else problem.token_mask.flatten()
    off = (logits.reshape(bound.logits.value.shape).to(torch.float64) - bound.logits.value).abs()[real]
    return () if bool((off <= bound.logits.radius[real]).all()) else ("logits of the gate are beyond their bound",)


def _relative(error: Tensor, expected: Tensor) -> float | None:
    size = float(expected.square().mean().sqrt()) if expected.numel() else 0.0
    return _short(float(error.square().mean().sqrt()) / size) if size else None


def _short(value: float) -> float:
    return float(f"{value:.4g}")
