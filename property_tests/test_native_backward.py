"""Gradients of the native kernels at each instruction-set level of this CPU, compared with float64."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import gradients, law
from test_native import ACTIVATIONS, DTYPES, RUNNABLE
from torch import Tensor

import moe_fn
from moe_fn import MoEConfig, MoEWeights
from moe_fn.config import as_activation
from moe_fn.fused.schema import packed
from moe_fn.kernels.arguments import DIFFERENTIABLE, flat
from moe_fn.kernels.native import library as native
from moe_fn.kernels.native import support
from moe_fn.reference.activation import activate
from moe_fn.testing import MoEProblem, assert_matches, configs, problems

pytestmark = pytest.mark.skipif(not RUNNABLE, reason="no native kernels here")
# rows of each expert: more than a block of steps of the outer products, more than a chunk of rows, and none
MANY = [[513, 1100, 0, 1], [2000]]
SMALL, WIDE = [(33, 17), (64, 48), (130, 90), (1, 1)], [(1600, 40), (40, 1600), (800, 5)]  # (hidden, intermediate)


@dataclass(frozen=True)
class Case:
    counts: list[int]
    hidden: int
    inner: int
    dtype: torch.dtype
    layout: Any
    activation: Any = "silu"
    interleaved: bool = False
    gate_up_bias: bool = True
    down_bias: bool = True
    kept: bool = True
    invariant: bool = False
    top_k: int = 1
    needed: int = 0b111111

    def made(self) -> tuple[MoEConfig, MoEWeights, Tensor, Tensor, Tensor, Tensor]:
        """Returns config, weights, x, ids, routing weights and gradient of the result. Elements that must not
        be read are NaN.
        """
        experts, gated = len(self.counts), as_activation(self.activation).gated
        config = MoEConfig(
            num_experts=experts + 1,
            top_k=self.top_k if experts else 1,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            activation=self.activation,
            weight_layout=self.layout,
            gate_up_layout="interleaved" if self.interleaved and gated else "packed",
            batch_invariant=self.invariant,
        )
        generator = torch.Generator().manual_seed(sum(self.counts) + self.hidden)
        both = 2 * self.inner if gated else self.inner

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(self.dtype)

        gate_up, down = (
            normal(experts + 1, both, self.hidden, scale=self.hidden**-0.5),
            normal(experts + 1, self.hidden, self.inner, scale=self.inner**-0.5),
        )
        if self.layout == "in_out":
            gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
        biases = {"gate_up_bias": normal(experts + 1, both), "down_bias": normal(experts + 1, self.hidden)}
        weights = MoEWeights(
            gate_up=gate_up, down=down, **{name: b for name, b in biases.items() if getattr(self, name)}
        )
        ids = torch.repeat_interleave(torch.arange(experts), torch.tensor(self.counts, dtype=torch.int64))
        ids = torch.cat([ids, torch.full((3 + -len(ids) % config.top_k + 2 * config.top_k,), -1)])
        ids = ids[: len(ids) // config.top_k * config.top_k]
        ids = ids[torch.randperm(len(ids), generator=generator)].view(-1, config.top_k)
        x, gradient = normal(len(ids), self.hidden), normal(len(ids), self.hidden)
        w = torch.rand(ids.shape, generator=generator) + 0.5
        unused = (ids < 0).all(1)
        x[unused], gradient[unused], w[ids < 0] = math.nan, math.nan, math.nan
        weights.gate_up[-1], weights.down[-1] = math.nan, math.nan
        return config, weights, x, ids, w, gradient


def check(level: str, case: Case) -> None:
    """Compares routed_experts_backward of a level with the derivative of a float64 loop over the experts.

    Derivatives of activations have steps (relu, limits), so the loop evaluates them at the pre-activations that the op
    saved, which are compared on their own.
    """
    config, weights, x, ids, w, gradient = case.made()
    arguments = flat(packed(config, weights, x, ids, w))
    ops: Any = native.library(level).ops
    y, pre = ops.routed_experts(*arguments, True)
    tensors = {
        "x": x,
        "w": w,
        "gate_up": weights.gate_up,
        "down": weights.down,
        "gate_up_bias": weights.gate_up_bias,
        "down_bias": weights.down_bias,
    }
    wide = {name: t.double().requires_grad_() for name, t in tensors.items() if t is not None}
    expected_y, start = torch.zeros(x.shape, dtype=torch.float64), 0
    for e in range(config.num_experts - 1):
        token, choice = (ids == e).nonzero(as_tuple=True)
        up, down = (wide[name][e] if case.layout == "out_in" else wide[name][e].mT for name in ("gate_up", "down"))
        h = wide["x"][token] @ up.mT + (wide["gate_up_bias"][e] if case.gate_up_bias else 0)
        kept = pre[start : start + len(token)]
        assert_matches(kept, h, scale=1.0, name="pre")
        a = activate(as_activation(case.activation), (h + (kept.double() - h).detach()).T, config.gate_up_layout).T
        out = a @ down.mT + (wide["down_bias"][e] if case.down_bias else 0)
        expected_y = expected_y.index_add(0, token, wide["w"][token, choice, None] * out)
        start += len(token)
    assert not pre[start:].any()
    assert_matches(y, expected_y, scale=1.0, name="y")
    used = (ids >= 0).any(1)
    expected = torch.autograd.grad(
        (expected_y[used] * gradient[used].double()).sum(), list(wide.values()), allow_unused=True
    )
    expected_of = dict(zip(wide, expected, strict=True))
    needed = [bool(case.needed >> i & 1) for i in range(len(DIFFERENTIABLE))]
    found = ops.routed_experts_backward(gradient, needed, pre if case.kept else pre.new_empty(0), *arguments)
    for need, (name, t), d in zip(needed, tensors.items(), found, strict=False):  # without adapters
        if not need or t is None:
            assert d.numel() == 0, f"d {name} was not asked for"
            continue
        assert d.dtype == t.dtype
        e = expected_of[name]
        terms = {"x": 1, "w": case.hidden}.get(name, max(case.counts, default=1))  # terms of size 1, which may cancel
        assert_matches(
            d,
            torch.zeros(t.shape, dtype=torch.float64) if e is None else e,
            scale=max(terms, 1) ** 0.5,
            name=f"d {name}",
        )


@pytest.mark.parametrize("level", RUNNABLE)
def test_gradients_of_more_rows_than_a_block_or_a_chunk(level: str) -> None:
    layouts = ["out_in", "in_out"]
    for counts, layout, dtype, invariant, kept in product(MANY, layouts, support.DTYPES, [True, False], [True, False]):
        check(level, Case(counts, 33, 17, dtype, layout, kept=kept, invariant=invariant))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    booleans = st.booleans()
    hidden, inner = draw(st.sampled_from(SMALL + WIDE))
    return Case(
        draw(st.lists(st.integers(0, 70), min_size=1, max_size=4)),
        hidden,
        inner,
        draw(DTYPES),
        draw(st.sampled_from(["out_in", "in_out"])),
        draw(st.sampled_from(ACTIVATIONS)),
        *(draw(booleans) for _ in range(5)),
        top_k=draw(st.integers(1, 2)),
        needed=draw(st.one_of(st.just(0b111111), st.integers(0, 0b111111))),
    )


@pytest.mark.parametrize("level", RUNNABLE)
@given(cases())
def test_gradients_of_every_level(level: str, case: Case) -> None:
    check(level, case)


@pytest.mark.parametrize("level", RUNNABLE)
def test_slopes_at_the_very_limits_and_kinks(level: str) -> None:
    """All pairs of a gate and an up at limits and kinks: torch's clamp has derivative 1 at the limit itself."""
    special = torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 7.0, -7.0])
    pairs, one = torch.cartesian_prod(special, special).T, torch.ones(1, 1)
    down = torch.linspace(-1, 1, pairs.shape[1])
    for of in ACTIVATIONS:
        activation = as_activation(of)
        h = pairs.flatten() if activation.gated else pairs[0]
        config = MoEConfig(num_experts=1, top_k=1, hidden_size=1, intermediate_size=len(down), activation=activation)
        weights = MoEWeights(gate_up=h.reshape(1, -1, 1), down=down.view(1, 1, -1))
        arguments = flat(packed(config, weights, one, torch.zeros(1, 1, dtype=torch.int64), one))
        ops: Any = native.library(level).ops
        found = ops.routed_experts_backward(
            one, [i == 2 for i in range(len(DIFFERENTIABLE))], one.new_empty(0), *arguments
        )[2].flatten()
        wide = h.double().requires_grad_()
        (expected,) = torch.autograd.grad(activate(activation, wide) @ down.double(), wide)
        assert_matches(found, expected, tolerance=1e-6, name=str(activation))


def check_outer(level: str, counts: list[list[int]], sets: int, extra: int, m: int, n: int, dtype: torch.dtype) -> None:
    """Checks grouped_outer, with or without a shared result of segments; each segment ends with rows of no expert."""
    rows = max(map(sum, counts)) + extra
    ends = torch.cat([torch.tensor(one).cumsum(0) + s * rows for s, one in enumerate(counts)]).to(torch.int32)
    generator = torch.Generator().manual_seed(m)
    left, right = (torch.randn(len(counts) * rows, width, generator=generator).to(dtype) for width in (m, n))
    expected = torch.zeros(sets, len(counts[0]), m, n, dtype=torch.float64)
    of_no_expert = torch.ones(len(left), dtype=torch.bool)
    for s, one in enumerate(counts):
        start = s * rows
        for e, count in enumerate(one):
            mine = slice(start, start + count)
            expected[s * sets // len(counts), e] += left[mine].double().mT @ right[mine].double()
            of_no_expert[mine] = False
            start += count
    left[of_no_expert], right[of_no_expert] = math.nan, math.nan
    ops: Any = native.library(level).ops
    out = ops.grouped_outer(left, right, ends, len(counts), sets)
    assert_matches(out, expected.flatten(0, 1), scale=1.0)
    assert not out[~expected.flatten(0, 1).any((1, 2))].any()  # without rows the result is exactly 0


@pytest.mark.parametrize("level", RUNNABLE)
def test_outer_products_of_many_rows(level: str) -> None:
    for counts, dtype, (m, n) in product(MANY, support.DTYPES, [(33, 17), (5, 70)]):
        check_outer(level, [counts], 1, 3, m, n, dtype)
    check_outer(level, [[2000, 0]], 1, 0, 5, 600, torch.float32)  # panels in two groups, also of an expert without rows


@pytest.mark.parametrize("level", RUNNABLE)
@given(
    st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),
    st.data(),
    st.integers(0, 3),
    st.integers(1, 70),
    st.integers(1, 70),
    DTYPES,
)
@settings(max_examples=25)
def test_outer_products_of_segments(
    level: str, segments: tuple[int, int], data: Any, extra: int, m: int, n: int, dtype: torch.dtype
) -> None:
    size = data.draw(st.integers(1, 4))
    counts = data.draw(
        st.lists(st.lists(st.integers(0, 40), min_size=size, max_size=size), min_size=segments[0], max_size=segments[0])
    )
    check_outer(level, counts, segments[1], extra, m, n, dtype)


NATIVE: dict[str, Any] = {
    "backend": "native",
    "opaque": False,
    "expert_norm": None,
    "gate_dtype": "float32",
    "score_dtype": "float32",
}


@law(problems(configs(**NATIVE, recompute=st.booleans(), lora=None, quant=None)))
def test_gradients_of_the_layer_equal_the_reference(problem: MoEProblem) -> None:
    expected = problem.call(moe_fn.reference.moe_forward)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    actual = gradients(problem, moe_fn.moe_forward, direction)
    for a, e in zip(actual, gradients(problem, moe_fn.reference.moe_forward, direction), strict=True):
        finite = torch.isfinite(e)  # the derivative of a NaN logit is undefined
        assert_matches(a[finite], e[finite].to(a.dtype), tolerance=1e-5, scale=0.1)
