"""The native library at each instruction-set level of this CPU, and on a machine without a compiler."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import on_every
from torch import Tensor

import moe_fn
from moe_fn import MoEConfig, MoEWeights, Routing
from moe_fn.config import ActivationConfig, as_activation
from moe_fn.fused.schema import packed
from moe_fn.kernels.arguments import DIFFERENTIABLE, flat
from moe_fn.kernels.native import library as native
from moe_fn.kernels.native import support
from moe_fn.testing import assert_matches
from moe_fn.weights.prepare import to_panels

LEVELS = list(native.LEVELS)
RUNNABLE = LEVELS[LEVELS.index(native.best_level()) :] if native.active().problem is None else []
RUNNABLE += [native.EMULATED_AMX] if RUNNABLE else []
ACTIVATIONS: list[Any] = ["silu", "gelu", "gelu_tanh", "swigluoai", "swiglustep", "relu2_no_mul", "gelu_no_mul", "relu"]
ACTIVATIONS.append(ActivationConfig(function="situ", gate_cap=3.0, up_cap=2.0))
# limits within the range of values
ACTIVATIONS += [ActivationConfig(function="silu", limit=0.5, limit_at=at) for at in ("input", "output")]
DTYPES = st.sampled_from(support.DTYPES)

pytestmark = pytest.mark.skipif(not RUNNABLE, reason="no native kernels here")


def call(level: str, config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> Tensor:
    """Calls the op in the library of one level."""
    arguments = flat(packed(config, weights, x, routing.expert_ids, routing.weights))
    out: Tensor = native.library(level).ops.routed_experts(*arguments, False)[0]  # type: ignore[attr-defined]
    return out


def problem(config: MoEConfig, tokens: int, dtype: torch.dtype, seed: int) -> tuple[MoEWeights, Tensor, Routing]:
    generator = torch.Generator().manual_seed(seed)
    experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    both = 2 * inner if as_activation(config.activation).gated else inner

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    gate_up, down = normal(experts, both, hidden, scale=hidden**-0.5), normal(experts, hidden, inner, scale=inner**-0.5)
    if config.weight_layout == "in_out":
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    weights = MoEWeights(
        gate_up=gate_up, down=down, gate_up_bias=normal(experts, both), down_bias=normal(experts, hidden)
    )
    ids = torch.randint(-1, experts, (tokens, config.top_k), generator=generator)
    return (
        weights,
        normal(tokens, hidden),
        Routing(expert_ids=ids, weights=torch.rand(tokens, config.top_k, generator=generator)),
    )


@pytest.mark.parametrize("level", RUNNABLE)
@on_every(ACTIVATIONS, lambda activation: ((5, 2, 33, 17), 20, activation, "out_in", False, torch.float32))
@given(
    st.sampled_from([(5, 2, 33, 17), (3, 3, 64, 48), (4, 2, 130, 90), (2, 1, 1, 1), (1, 1, 1600, 40)]),
    st.integers(0, 64),
    st.sampled_from(ACTIVATIONS),
    st.sampled_from(["out_in", "in_out"]),
    st.booleans(),
    DTYPES,
)
def test_every_level_equals_the_reference(
    level: str, shape: tuple[int, ...], tokens: int, activation: Any, layout: Any, other: bool, dtype: torch.dtype
) -> None:
    experts, top_k, hidden, inner = shape
    gated = as_activation(activation).gated
    config = MoEConfig(
        num_experts=experts,
        top_k=top_k,
        hidden_size=hidden,
        intermediate_size=inner,
        activation=activation,
        weight_layout=layout,
        gate_up_layout="interleaved" if other and gated else "packed",
    )
    weights, x, routing = problem(config, tokens, dtype, tokens)
    expected = moe_fn.reference.moe_forward_routed(config, weights, x, routing)
    gate_up, down = to_panels(config, weights.gate_up, weights.down)
    for w in (
        weights,
        MoEWeights(gate_up=gate_up, down=down, gate_up_bias=weights.gate_up_bias, down_bias=weights.down_bias),
    ):
        assert_matches(call(level, config, w, x, routing), expected, scale=1.0)


@pytest.mark.parametrize("level", RUNNABLE)
@pytest.mark.parametrize("dtype", support.DTYPES)
@pytest.mark.parametrize(
    ("activation", "gate_up_layout"), [("silu", "packed"), ("silu", "interleaved"), ("relu2_no_mul", "packed")]
)
def test_few_and_many_rows_of_weights_kept_in_out(
    level: str, dtype: torch.dtype, activation: Any, gate_up_layout: Any
) -> None:
    # Numbers of rows above and below the kernels' thresholds, columns and steps that are not whole vectors, and tasks
    # with several runs of panels.
    shapes = [(1, 45, 23, 1), (2, 33, 17, 2), (2, 7, 5, 15), (1, 129, 65, 64), (1, 129, 65, 65), (24, 33, 170, 60)]
    for experts, hidden, inner, rows in shapes:
        config = MoEConfig(
            num_experts=experts + 1,
            top_k=1,
            hidden_size=hidden,
            intermediate_size=inner,
            activation=activation,
            weight_layout="in_out",
            gate_up_layout=gate_up_layout,
        )
        weights, x, routing = problem(config, experts * rows, dtype, rows)
        # an expert without rows, after the last one that is read
        weights.gate_up[-1], weights.down[-1] = math.nan, math.nan
        routing = Routing(expert_ids=torch.arange(experts * rows)[:, None] % experts, weights=routing.weights)
        expected = moe_fn.reference.moe_forward_routed(config, weights, x, routing)
        assert_matches(call(level, config, weights, x, routing), expected, scale=1.0)


@pytest.mark.parametrize("level", RUNNABLE)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5),
    st.integers(0, 3),
    st.integers(1, 70),
    st.integers(1, 70),
    DTYPES,
    st.booleans(),
)
def test_grouped_products_of_every_level(
    level: str, counts: list[int], extra: int, m: int, n: int, dtype: torch.dtype, invariant: bool
) -> None:
    generator = torch.Generator().manual_seed(m)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    total = int(ends[-1]) + extra
    left, right = (torch.randn(total, width, generator=generator).to(dtype) for width in (m, n))
    weight = torch.randn(len(counts), m, n, generator=generator).to(dtype)
    left[int(ends[-1]) :] = math.nan  # rows of no expert are never read
    ops: Any = native.library(level).ops
    outer = ops.grouped_outer(left, right, ends, 1, 1)
    product, transposed = (
        ops.grouped_matmul(left, weight, ends, False, 1, 1, invariant),
        ops.grouped_matmul(left, weight.mT.contiguous(), ends, True, 1, 1, invariant),
    )
    start = 0
    for expert, end in enumerate(ends.tolist()):
        rows = left[start:end].double()
        assert_matches(outer[expert], rows.mT @ right[start:end].double(), scale=1.0)
        for out in (product, transposed):
            assert_matches(out[start:end], rows @ weight[expert].double(), scale=1.0)
        start = end
    assert not product[start:].any() and not transposed[start:].any()


@pytest.mark.parametrize("level", RUNNABLE)
def test_every_float16_is_read_and_products_are_rounded_to_nearest(level: str) -> None:
    """Products of two float16 are exact in float32: all float16 times a few, with ties, subnormals and infinities."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16)[:, None]
    others = torch.tensor([1.0, 1 + 2.0**-10, 0.75, 2.0**-9, 2.0**-20, 40000.0], dtype=torch.float16)
    expected = (every.float() * others.float()).half()
    ends = torch.tensor([len(every)], dtype=torch.int32)
    ops: Any = native.library(level).ops
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # flushing is a thread's own
        for flushed in (False, True):
            torch.set_flush_denormal(flushed)
            out = [
                ops.grouped_matmul(every, others.view(1, *at), ends, at[0] == 6, 1, 1, False) for at in ((1, 6), (6, 1))
            ]
            torch.set_flush_denormal(False)
            assert all(
                torch.equal(o.nan_to_num(7.0, math.inf, -math.inf), expected.nan_to_num(7.0, math.inf, -math.inf))
                for o in out
            )
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("level", RUNNABLE)
def test_infinite_and_missing_values_stay_in_their_rows(level: str) -> None:
    config = MoEConfig(num_experts=2, top_k=1, hidden_size=33, intermediate_size=17)
    weights, x, routing = problem(config, 20, torch.float32, 0)
    clean = call(level, config, weights, x, routing)
    spoiled = x.clone()
    spoiled[3], spoiled[7] = math.nan, math.inf
    out = call(level, config, weights, spoiled, routing)
    rest = [t for t in range(20) if t not in (3, 7)]
    assert_matches(out[rest], clean[rest], scale=1.0)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("dtype", support.DTYPES)
def test_thread_counts_do_not_change_the_numbers_beyond_rounding(layout: Any, dtype: torch.dtype) -> None:
    config = MoEConfig(num_experts=6, top_k=2, hidden_size=96, intermediate_size=64, weight_layout=layout)
    weights, x, routing = problem(config, 50, dtype, 1)
    threads = torch.get_num_threads()
    try:
        outs = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            outs.append(call(RUNNABLE[0], config, weights, x, routing))
    finally:
        torch.set_num_threads(threads)
    for out in outs:
        assert_matches(out, outs[0], tolerance=0.0)


def test_wrong_shapes_raise_in_words() -> None:
    config = MoEConfig(num_experts=2, top_k=1, hidden_size=4, intermediate_size=4)
    weights, x, routing = problem(config, 3, torch.float32, 0)
    ops: Any = native.library(RUNNABLE[0]).ops
    with pytest.raises(ValueError, match="expected 8 columns of 5 products"):
        call(RUNNABLE[0], config, weights, torch.ones(3, 5), routing)
    gate_up, down = to_panels(config, weights.gate_up, weights.down)
    for part in (gate_up[:, 1:], gate_up[:, :, 1:], gate_up[..., 1:]):
        with pytest.raises(ValueError, match="expected 8 columns of 4 products, plain or prepared"):
            call(RUNNABLE[0], config, replace(weights, gate_up=part, down=down), x, routing)
    for ends, segments, last in (
        ([2, 1], 1, 3),
        ([1, 9], 1, 3),
        ([-1, 1], 1, 3),
        ([1, 2, 2, 3], 3, ""),
        ([1, 4, 4, 6], 2, 3),
    ):
        rows, wanted = (
            torch.ones(3 * segments, 4),
            f"up to {last}" if last else "4 ends and 9 rows do not split into 3 segments",
        )
        with pytest.raises(ValueError, match=wanted):
            ops.grouped_matmul(rows, weights.gate_up, torch.tensor(ends, dtype=torch.int32), True, segments, 1, False)
    one, ends = torch.ones(4, 4), torch.tensor([1, 4, 4, 4], dtype=torch.int32)
    for segments, sets, wanted in ((0, 1, "into 0 segments"), (2, 0, "of 0 sets of weights")):
        for product in (
            lambda s, w: ops.grouped_outer(one, one, ends, s, w),
            lambda s, w: ops.grouped_matmul(one, one[None], ends, True, s, w, False),
        ):
            with pytest.raises(ValueError, match=wanted):
                product(segments, sets)
    with pytest.raises(ValueError, match="expected 4 matrices"):
        ops.grouped_matmul(one, weights.gate_up, ends, True, 1, 1, False)
    plain, prepared = (
        flat(packed(config, w, x, routing.expert_ids, routing.weights))
        for w in (weights, replace(weights, gate_up=gate_up, down=down))
    )
    for gradient, arguments in ((x[:2], plain), (x[:, :3], plain), (x.double(), plain), (x, prepared)):
        with pytest.raises(ValueError, match=r"gradient is .*; expected that of x, and plain weights"):
            ops.routed_experts_backward(gradient, [True] * len(DIFFERENTIABLE), x.new_empty(0), *arguments)


WITHOUT_COMPILER = """
import torch, moe_fn
config = moe_fn.MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=8)
weights = moe_fn.MoEWeights(gate_up=torch.randn(4, 16, 8), down=torch.randn(4, 8, 8))
assert moe_fn.prepare_weights(config, weights) is weights
x, logits = torch.randn(5, 8), torch.randn(5, 4)
y = moe_fn.moe_forward(config, weights, x, logits)
torch.testing.assert_close(y.double(), moe_fn.reference.moe_forward(config, weights, x, logits), rtol=1e-5, atol=1e-5)
info = {info.name: info for info in moe_fn.backends()}
assert not info["native"].available and "cpu" in info["torch"].chosen_by_auto_on
print(info["native"].reason)
"""


def test_without_a_compiler_torch_runs_and_says_why(tmp_path: Path) -> None:
    """A truncated library is in the folder: loading it would crash the process."""
    library = native.active().path
    assert library is not None
    half = tmp_path / "moe_fn" / library.name
    half.parent.mkdir()
    half.write_bytes(library.read_bytes()[: library.stat().st_size // 2])
    settings = ["CC=/no/such/compiler", "CXX=/no/such/compiler", f"TORCH_EXTENSIONS_DIR={tmp_path}"]
    command = ["env", *settings, sys.executable, "-c", WITHOUT_COMPILER]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(moe_fn.__file__).parents[1])
    assert run.returncode == 0, run.stderr
    assert "no native CPU kernels" in run.stderr and "/no/such/compiler" in run.stdout + run.stderr
    assert f"{half} is damaged" in run.stderr


@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
@pytest.mark.parametrize("of_biases", (torch.float16, torch.bfloat16, torch.float64), ids=str)
def test_biases_are_numbers_in_any_float_dtype(of_biases: torch.dtype, dtype: torch.dtype) -> None:
    config = MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=6, backend="native")
    weights, x, routing = problem(config, 5, dtype, seed=0)
    biases = [torch.randn(4, size).to(of_biases).requires_grad_() for size in (12, 8)]
    y = moe_fn.moe_forward_routed(config, replace(weights, gate_up_bias=biases[0], down_bias=biases[1]), x, routing)
    wide = [b.detach().float() for b in biases]
    expected = moe_fn.moe_forward_routed(config, replace(weights, gate_up_bias=wide[0], down_bias=wide[1]), x, routing)
    assert_matches(y, expected)
    y.sum().backward()
    assert all(b.grad is not None and b.grad.dtype == of_biases and b.grad.any() for b in biases)
