"""Laws of the campaign: errors are within their bounds, balls contain the exact values, and a run resumes where it
stopped.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from campaign import every_problem, problem_of
from campaign.__main__ import main
from campaign.checking import check, check_problem
from campaign.coverage import coverage_of
from campaign.features import features_of
from campaign.laws import LAWS, laws_of
from campaign.running import LINES, lines_of, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planted.bugs import planted
from planted.campaign import BUGS
from support import law
from torch import Tensor

import moe_fn
from moe_fn.reference.quant import rounded
from moe_fn.testing import MoEProblem, quants
from moe_fn.testing.bounds import ball
from moe_fn.testing.bounds.inputs import coded

SEEDS = st.integers(0, 2**20)
UNITS = ball.UNITS[torch.float32]


@settings(max_examples=15)
@law(every_problem())
def test_the_error_of_the_layer_is_within_its_bound(problem: MoEProblem) -> None:
    """All ways to call the layer are compared, and choices of experts, logits and gradients too."""
    assert not check_problem(problem).failures


@settings(max_examples=2, suppress_health_check=[HealthCheck.nested_given])  # problems are drawn inside
@law(st.integers(1, 3))
def test_a_campaign_that_goes_on_is_one_that_never_stopped(cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder, "whole"), Path(folder, "parts")
        expected = run(whole, 4, seed=5)
        run(parts, cut, seed=5)
        with (parts / LINES).open("a") as file:
            file.write('{"seed": 5, "ind')  # the process was killed during a write
        assert run(parts, 4, seed=5) == expected == lines_of(parts)
        assert [line.index for line in expected] == [0, 1, 2, 3]
        with pytest.raises(ValueError, match="campaign of seed 5; expected seed 6"):
            run(parts, 4, seed=6)


@given(st.integers(1, 40), SEEDS)
def test_float32_lies_in_its_balls(width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, x, s = (torch.randn(shape, generator=generator) for shape in ((5, width), (width,), (width,)))
    x = x * 2.0 ** float(torch.randint(-9, 9, (), generator=generator))
    exact_x, exact_s = (ball.exact(t.double()) for t in (x, s))
    assert_inside(w @ x, ball.stored(UNITS, ball.product(UNITS, ball.exact(w.double()), exact_x)))
    assert_inside(x.flip(0).cumsum(0)[-1], ball.summed(UNITS, exact_x, 0))
    assert_inside(x * s, ball.wide(UNITS, ball.times(exact_x, exact_s)))
    mean = x.square().mean()
    assert_inside(
        x * torch.rsqrt(mean + 0.01) * s, ball.wide(UNITS, ball.times(ball.norm(UNITS, exact_x, 0.01), exact_s))
    )


@given(
    st.integers(2, 9),
    SEEDS,
    st.sampled_from((torch.relu, torch.sigmoid, torch.tanh, torch.nn.functional.silu, torch.abs)),
)
def test_what_is_inside_stays_inside(count: int, seed: int, function: object) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        ball.Ball(torch.randn(count, generator=generator).double(), torch.rand(count, generator=generator).double())
        for _ in "ab"
    )
    inside_a, inside_b = (
        t.value + t.radius * (2 * torch.rand(count, generator=generator).double() - 1) for t in (a, b)
    )
    assert_inside(inside_a + inside_b, ball.plus(a, b))
    assert_inside(inside_a * inside_b, ball.times(a, b))
    assert_inside(inside_a / (inside_b.abs() + 0.1), ball.over(a, ball.Ball(b.value.abs() + 0.1, b.radius)))
    if function is not torch.abs:  # abs of an interval around 0
        assert_inside(function(inside_a), ball.monotone(a, function, 1.0))  # type: ignore[operator]


@settings(max_examples=100)
@given(
    quants().filter(lambda quant: quant.activations is not None and not quant.activations.static),
    st.integers(1, 40),
    SEEDS,
)
def test_inputs_near_a_number_round_to_its_ball(quant: moe_fn.QuantConfig, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(width, generator=generator).double()
    v = (v * 8).round() / 8 if seed % 2 else v  # ties, and largest values that are powers of two
    radius = torch.rand(width, generator=generator).double() * 10.0 ** -float(
        torch.randint(1, 9, (), generator=generator)
    )
    assert quant.activations is not None
    values, undecided = coded(quant.activations, ball.Ball(v[None], radius[None]), None, None, True)
    assert_inside(rounded(quant.activations, v), ball.Ball(values.value[0], values.radius[0]))
    for part in (-1.0, 1.0, 0.5):
        near = rounded(quant.activations, v + part * radius * torch.sign(torch.randn(width, generator=generator)))
        assert_inside(near, ball.Ball(values.value[0], values.radius[0]))
    assert undecided.shape == (1, width)


def assert_inside(actual: Tensor, expected: ball.Ball) -> None:
    assert ((actual.double() - expected.value).abs() <= expected.radius + 1e-14 * expected.value.abs()).all()


def test_a_quotient_by_what_may_be_zero_has_no_bound() -> None:
    one, near_zero = torch.ones(1), ball.Ball(torch.tensor([0.5]), torch.tensor([0.5]))
    assert ball.over(ball.exact(one), near_zero).radius.isinf().all()


def test_bounds_are_near_the_errors() -> None:
    """In bfloat16 a single rounding error reaches a fifth of the bound; a bound ten times as large would miss bugs."""
    shares = [check(0, index).of_bound.get("the layer", 0.0) for index in range(16)]
    assert 0.2 < max(shares) <= 1.0


def test_a_bug_is_found_and_told_with_how_to_see_it_again() -> None:
    with planted(BUGS[1]):
        failures = [line for line in (check(0, index) for index in range(8)) if line.failures]
    assert failures and all("of the bound" in line.failures[0] or "gradients" in line.failures[0] for line in failures)


def test_pairs_that_meet_are_those_that_may() -> None:
    coverage = coverage_of([features_of(problem_of(1, index)) for index in range(100)])
    assert coverage.forbidden_but_met == ()
    assert coverage.possible - len(coverage.missing) > 6000


def test_every_law_has_its_turn() -> None:
    assert {name for index in (0, 1) for name in laws_of(index)} == set(LAWS)


def test_the_command_runs_reports_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, pages = str(tmp_path / "lines"), tmp_path / "pages"
    assert main(["run", "--problems", "3", "--seed", "2", "--out", out]) == 0
    assert main(["run", "--problems", "9", "--seed", "2", "--out", out, "--seconds", "0"]) == 0
    assert "3 problems of 9, 0 failed" in capsys.readouterr().out
    assert main(["report", "--out", out, "--to", str(pages)]) == 0
    values = json.loads((pages / "campaign.json").read_text())
    assert values["problems"] == 3 and values["failures"] == {}
    for page, title in (("campaign.md", "# A campaign of 3 problems"), ("numerics.md", "# Numerics")):
        assert (pages / page).read_text().startswith(title)
    assert main(["show", "--seed", "2", "--index", "1"]) == 0
    assert "MoEProblem(config=MoEConfig(" in capsys.readouterr().out
