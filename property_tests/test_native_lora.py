"""Low-rank adapters in the native kernels at each instruction-set level of this CPU, compared with float64: values,
gradients, and bits in another batch.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import on_every
from test_native import DTYPES, RUNNABLE
from torch import Tensor

from moe_fn import LoRAConfig, LoRAWeights, MoEConfig, MoEWeights, QuantConfig, Routing, reference
from moe_fn.config import as_activation
from moe_fn.fused.schema import packed
from moe_fn.kernels.arguments import DIFFERENTIABLE, flat
from moe_fn.kernels.native import library as native
from moe_fn.reference.activation import activate
from moe_fn.testing import TOLERANCES, assert_matches, weights_for
from moe_fn.weights.prepare import to_panels

pytestmark = pytest.mark.skipif(not RUNNABLE, reason="no native kernels here")

NAMES = ("gate_up_a", "gate_up_b", "down_a", "down_b")
Kind = Literal["each", "shared", "outer_shared"]


@dataclass(frozen=True)
class Case:
    tokens: int
    rank: int
    size: tuple[int, int] = (64, 48)  # hidden, intermediate
    adapters: int = 3
    kind: Kind = "each"
    only: str = ""  # of one product
    dtype: torch.dtype = torch.float32
    layout: Any = "out_in"
    interleaved: bool = False
    gated: bool = True
    invariant: bool = False
    experts: int = 3
    without_ids: bool = False

    def made(self) -> tuple[MoEConfig, MoEWeights, Tensor, Routing]:
        config = MoEConfig(
            num_experts=self.experts,
            top_k=min(2, self.experts),
            hidden_size=self.size[0],
            intermediate_size=self.size[1],
            activation="silu" if self.gated else "gelu_no_mul",
            weight_layout=self.layout,
            gate_up_layout="interleaved" if self.interleaved and self.gated else "packed",
            batch_invariant=self.invariant,
            lora=LoRAConfig(num_adapters=1 if self.without_ids else self.adapters, rank=self.rank, experts=self.kind),
        )
        generator = torch.Generator().manual_seed(self.tokens + self.rank)
        weights = weights_for(config, generator, dtype=self.dtype, bias=True)
        given = {name: getattr(weights.lora, name) for name in NAMES if name.startswith(self.only)}
        x = torch.randn(self.tokens, self.size[0], generator=generator).to(self.dtype)
        ids = torch.randint(-1, self.experts, (self.tokens, config.top_k), generator=generator)
        adapters = torch.randint(-1, self.adapters + 1, (self.tokens,), generator=generator)
        routing = Routing(
            expert_ids=ids,
            weights=torch.rand(ids.shape, generator=generator) + 0.5,
            adapter_ids=None if self.without_ids else adapters,
        )
        return config, replace(weights, lora=LoRAWeights(**given)), x, routing


def arguments(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> tuple[Any, ...]:
    return flat(packed(config, weights, x, routing.expert_ids, routing.weights, routing.adapter_ids))


def in_float64(
    config: MoEConfig, wide: dict[str, Tensor | None], x: Tensor, w: Tensor, routing: Routing, kept: Tensor
) -> Tensor:
    """The layer, one (expert, adapter) at a time, in the order of saved pre-activations, which are compared."""
    y, start = torch.zeros(x.shape, dtype=torch.float64), 0
    assert config.lora is not None
    count = config.lora.num_adapters
    adapters = torch.zeros(len(x), dtype=torch.int64) if routing.adapter_ids is None else routing.adapter_ids
    adapters = torch.where((adapters >= 0) & (adapters < count), adapters, count)

    def matrix(name: str, e: int, adapter: int) -> Tensor:
        base, a, b = (wide[name + end] for end in ("", "_a", "_b"))
        assert base is not None
        of_expert = base[e] if config.weight_layout == "out_in" else base[e].mT
        if a is None or b is None or adapter == count:
            return of_expert
        return of_expert + b[adapter, e % b.shape[1]] @ a[adapter, e % a.shape[1]]

    for e in range(config.num_experts):
        for adapter in range(count + 1):
            token, choice = ((routing.expert_ids == e) & (adapters == adapter).unsqueeze(1)).nonzero(as_tuple=True)
            h = x[token] @ matrix("gate_up", e, adapter).mT + wide["gate_up_bias"][e]  # type: ignore[index]
            assert_matches(kept[start : start + len(token)], h, scale=1.0, name="pre")
            start += len(token)
            a = activate(as_activation(config.activation), h.T, config.gate_up_layout).T
            out = a @ matrix("down", e, adapter).mT + wide["down_bias"][e]  # type: ignore[index]
            y = y.index_add(0, token, w[token, choice, None] * out)
    assert not kept[start:].any()
    return y


def check(level: str, case: Case) -> None:
    config, weights, x, routing = case.made()
    ops: Any = native.library(level).ops
    args = arguments(config, weights, x, routing)
    y, pre = ops.routed_experts(*args, True)
    lora = {name: getattr(weights.lora, name) for name in NAMES}
    plain = {name: getattr(weights, name) for name in ("gate_up", "down", "gate_up_bias", "down_bias")}
    tensors = {"x": x, "expert_weights": routing.weights, **plain, **lora}
    wide = {n: None if t is None else t.double().requires_grad_() for n, t in tensors.items()}
    expected = in_float64(config, wide, wide["x"], wide["expert_weights"], routing, pre)  # type: ignore[arg-type]
    # Products with A are rounded to the dtype, so that a gradient has four roundings in a row; with one token and
    # rank 1 they all have one sign.
    tolerance = {dtype: (1 if dtype == torch.float32 else 2) * t for dtype, t in TOLERANCES.items()}
    assert_matches(y, expected, tolerance=tolerance, scale=1.0, name="y")
    gate_up, down = to_panels(config, weights.gate_up, weights.down)
    prepared = arguments(config, replace(weights, gate_up=gate_up, down=down), x, routing)
    assert_matches(
        ops.routed_experts(*prepared, False)[0], expected, tolerance=tolerance, scale=1.0, name="y of prepared"
    )
    if case.invariant:
        for few in (slice(0, 1), slice(1, 8), slice(2, None)):
            ids = None if routing.adapter_ids is None else routing.adapter_ids[few]
            part = Routing(expert_ids=routing.expert_ids[few], weights=routing.weights[few], adapter_ids=ids)
            assert torch.equal(ops.routed_experts(*arguments(config, weights, x[few], part), False)[0], y[few])
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    asked = [t for t in wide.values() if t is not None]
    found = iter(torch.autograd.grad((expected * gradient.double()).sum(), asked, allow_unused=True))
    expected_of = {name: None if t is None else next(found) for name, t in wide.items()}
    for needed in ([True] * len(DIFFERENTIABLE), [name.endswith(("_a", "_b")) for name in DIFFERENTIABLE]):
        kept = pre if all(needed) else pre.new_empty(0)
        gradients = ops.routed_experts_backward(gradient, needed, kept, *args)
        for need, name, d in zip(needed, DIFFERENTIABLE, gradients, strict=True):
            t, e = tensors[name], expected_of[name]
            if not need or t is None:
                assert d.numel() == 0, f"d {name} was not asked for"
                continue
            e = torch.zeros(t.shape, dtype=torch.float64) if e is None else e
            scale = {"x": 1, "expert_weights": case.size[0]}.get(name, max(case.tokens, 1)) ** 0.5
            assert d.dtype == t.dtype
            assert_matches(d.to(case.dtype), e, tolerance=tolerance, scale=scale, name=f"d {name}")


CASES = (
    Case(9, 16, dtype=torch.bfloat16),
    Case(9, 8, dtype=torch.bfloat16, interleaved=True),
    Case(9, 16, without_ids=True),
    Case(40, 4, kind="shared", gated=False, layout="in_out"),
    Case(40, 32, kind="outer_shared", dtype=torch.bfloat16, invariant=True),
    Case(20, 5, size=(33, 17), dtype=torch.bfloat16, only="gate_up"),
    Case(20, 3, size=(130, 90), only="down", invariant=True, layout="in_out"),
    Case(30, 150, adapters=2),  # a rank that is stored in several parts
    Case(700, 3, experts=1, adapters=2, dtype=torch.bfloat16),  # more rows than a block, than dots and streams take
    Case(9, 1, size=(1, 1)),
)


@pytest.mark.parametrize("level", RUNNABLE)
@settings(max_examples=12)
@on_every(CASES, lambda case: (case,))
@given(
    st.builds(
        Case,
        tokens=st.integers(0, 40),
        rank=st.sampled_from([1, 2, 4, 7, 8, 16, 33]),
        size=st.sampled_from([(33, 17), (64, 48), (130, 90), (9, 3)]),
        adapters=st.integers(1, 4),
        kind=st.sampled_from(["each", "shared", "outer_shared"]),
        only=st.sampled_from(["", "", "gate_up", "down"]),
        dtype=DTYPES,
        layout=st.sampled_from(["out_in", "in_out"]),
        interleaved=st.booleans(),
        gated=st.booleans(),
        invariant=st.booleans(),
        without_ids=st.booleans(),
    )
)
def test_adapters_of_every_level(level: str, case: Case) -> None:
    check(level, case)


QUANTS = (
    QuantConfig(scheme="int8", granularity="channel"),
    QuantConfig(scheme="int4", granularity="group", group_size=16, zero_points=True),
    QuantConfig(scheme="fp8_e4m3", granularity="tensor"),
)


@pytest.mark.parametrize("level", RUNNABLE)
@pytest.mark.parametrize("quant", QUANTS, ids="{0.scheme}".format)
def test_adapters_of_quantized_experts(level: str, quant: QuantConfig) -> None:
    config, _, x, routing = Case(30, 6, size=(130, 90)).made()  # 90 inputs: a part of a chunk of packed rows is empty
    config = replace(config, quant=quant)
    weights = weights_for(config, torch.Generator().manual_seed(1), bias=True)
    y = native.library(level).ops.routed_experts(*arguments(config, weights, x, routing), False)[0]  # type: ignore[attr-defined]
    assert_matches(y, reference.moe_forward_routed(config, weights, x, routing), scale=1.0)


def test_adapters_that_do_not_fit_are_refused_in_words() -> None:
    config, weights, x, routing = Case(5, 2).made()
    op: Any = native.library(RUNNABLE[0]).ops.routed_experts  # type: ignore[attr-defined]
    assert weights.lora is not None and weights.lora.down_a is not None
    wrong = {
        "3 adapters without adapter_ids": (weights, replace(routing, adapter_ids=None)),
        "expected 5 ids": (weights, replace(routing, adapter_ids=torch.zeros(4, dtype=torch.int64))),
        "one of A and B": (replace(weights, lora=replace(weights.lora, down_b=None)), routing),
        "by 3 or 1 by the rank by 48": (
            replace(weights, lora=replace(weights.lora, down_a=weights.lora.down_a[..., 1:])),
            routing,
        ),
    }
    for words, (given_weights, given_routing) in wrong.items():
        with pytest.raises(ValueError, match=words):
            op(*arguments(config, given_weights, x, given_routing), False)
