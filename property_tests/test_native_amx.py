"""The level "amx" on any machine: its sources with emulated tile instructions, and its compiled library with trapped
ones (on a CPU with AMX they run). Both have the same bits, and a token's do not depend on the other tokens.
"""

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import test_native_lora
import torch
from test_native import call
from test_native_backward import Case
from test_quant_native import NAME, QUANTS
from test_quant_native import problem as quantized_problem
from tools.trapped_tiles import Trapped, tiles_in_use, trapped_tiles
from torch import Tensor

import moe_fn
from moe_fn.config import QuantConfig
from moe_fn.fused.schema import packed
from moe_fn.kernels.arguments import DIFFERENTIABLE, flat
from moe_fn.kernels.native import library as native
from moe_fn.testing import assert_matches
from moe_fn.weights.prepare import to_panels

HERE = native.active().problem is None
TRAPPED = HERE and platform.system() == "Linux" and native.best_level() == "avx512_bf16"
# the library of "amx" is a build of its own
COMPILED = [pytest.param("amx", marks=pytest.mark.thorough)] if TRAPPED or native.best_level() == "amx" else []
LEVELS = [native.EMULATED_AMX, *COMPILED]

pytestmark = pytest.mark.skipif(not HERE, reason="no native kernels here")


@contextlib.contextmanager
def tiles() -> Iterator[Trapped | None]:
    """Executes tile instructions; they must be those that a CPU accepts, and leave no configuration behind."""
    if not TRAPPED:
        yield None
        assert native.best_level() != "amx" or not tiles_in_use(), "tiles are not released"
        return
    with trapped_tiles() as trapped:
        yield trapped
    assert trapped.violation == ""
    assert trapped.configured == 0, "tiles are not released"


def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Whether all bits are equal; NaN equals NaN."""
    integers = {2: torch.int16, 4: torch.int32}[one.element_size()]
    missing = one.isnan()
    both = (t.masked_fill(missing, 0).contiguous().view(integers) for t in (one, other))
    return torch.equal(missing, other.isnan()) and torch.equal(*both)


def outputs(level: str, case: Case, prepared: bool) -> tuple[Tensor, ...]:
    """The op's result, and without preparation also its gradients; a third of x is denormal."""
    config, weights, x, ids, w, gradient = case.made()
    x[::3] *= 1e-38
    if prepared:
        gate_up, down = to_panels(config, weights.gate_up, weights.down)
        weights = replace(weights, gate_up=gate_up, down=down)
    arguments = flat(packed(config, weights, x, ids, w))
    ops: Any = native.library(level).ops
    y, pre = ops.routed_experts(*arguments, True)
    if prepared:
        return y, pre
    return y, pre, *ops.routed_experts_backward(gradient, [True] * len(DIFFERENTIABLE), pre, *arguments)


# Rows of an expert: below and above one and two tiles, a chunk of `stream` and a block. Inner dimensions: below, at and
# above 16 pairs, odd, and of several blocks of steps.
CASES = [
    Case([1, 0, 16, 17], 33, 17, torch.bfloat16, "out_in"),
    Case([33, 66, 2], 64, 48, torch.bfloat16, "in_out", interleaved=True),
    Case([3, 70], 130, 90, torch.bfloat16, "in_out"),
    Case([20], 1600, 40, torch.bfloat16, "out_in", activation="relu2_no_mul"),
    Case([40, 5], 1, 1, torch.bfloat16, "in_out", invariant=True),
    Case([18, 35], 4200, 3, torch.bfloat16, "in_out"),
]


@pytest.mark.thorough
@pytest.mark.skipif(not COMPILED, reason="needs a CPU with AMX or AVX-512 for bfloat16")
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.counts} {case.hidden} {case.layout}")
def test_emulated_and_compiled_tiles_have_the_same_bits(case: Case, prepared: bool) -> None:
    expected = outputs(native.EMULATED_AMX, case, prepared)
    with tiles() as trapped:
        found = outputs("amx", case, prepared)
    assert all(equal_bits(f, e) for f, e in zip(found, expected, strict=True))
    if trapped is not None:
        assert trapped.count("products") > 0 and trapped.count("configurations") == trapped.count("releases") > 0


@pytest.mark.thorough
@pytest.mark.skipif(not COMPILED, reason="needs a CPU with AMX or AVX-512 for bfloat16")
@pytest.mark.parametrize(("tokens", "rank"), [(60, 5), (9, 40)])
def test_emulated_and_compiled_tiles_of_adapters_have_the_same_bits(tokens: int, rank: int) -> None:
    config, weights, x, routing = test_native_lora.Case(tokens, rank, dtype=torch.bfloat16).made()
    arguments = test_native_lora.arguments(config, weights, x, routing)

    def found(level: str) -> tuple[Tensor, ...]:
        ops: Any = native.library(level).ops
        y, pre = ops.routed_experts(*arguments, True)
        return y, pre, *ops.routed_experts_backward(torch.ones_like(y), [True] * len(DIFFERENTIABLE), pre, *arguments)

    expected = found(native.EMULATED_AMX)
    with tiles():
        assert all(equal_bits(*pair) for pair in zip(found("amx"), expected, strict=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("columns", [1, 32, 70])
@pytest.mark.parametrize("inner", [1, 31, 32, 45, 1601, 4200])
def test_bits_of_a_row_do_not_depend_on_other_rows_or_the_layout_of_weights(
    level: str, inner: int, columns: int
) -> None:
    generator = torch.Generator().manual_seed(inner)
    rows = torch.randn(70, inner, generator=generator).bfloat16()
    weight = torch.randn(1, columns, inner, generator=generator).bfloat16()
    ops: Any = native.library(level).ops
    expected = (rows.double() @ weight[0].double().mT).bfloat16()
    first = None
    with tiles():
        for count in (1, 16, 17, 33, 64, 70):
            ends = torch.tensor([count], dtype=torch.int32)
            for invariant in (False, True):
                for transposed, w in ((True, weight), (False, weight.mT.contiguous())):
                    out = ops.grouped_matmul(rows[:count], w, ends, transposed, 1, 1, invariant)
                    assert_matches(out, expected[:count], scale=1.0)
                    first = out[:1] if first is None else first
                    assert equal_bits(out[:1], first)


@pytest.mark.parametrize("level", LEVELS)
def test_prepared_and_plain_weights_have_the_same_bits(level: str) -> None:
    for case in CASES:
        with tiles():
            plain, prepared = (outputs(level, case, prepared)[:2] for prepared in (False, True))
        assert all(equal_bits(*pair) for pair in zip(plain, prepared, strict=True))


@pytest.mark.parametrize("level", LEVELS)
def test_denormals_are_zero(level: str) -> None:
    """Of operands, of products, of sums of products, and of the sum of even and odd elements."""
    ops: Any = native.library(level).ops
    smallest = 2.0**-126
    for x, w, expected in (
        ([smallest / 2, 0], [2.0**100, 0], 0),
        ([2.0**100, 0], [smallest / 2, 0], 0),
        ([2.0**-100, 0], [2.0**-30, 0], 0),
        ([2.0**-64, 0, 2.0**-64, 0], [1.5 * 2.0**-62, 0, -(2.0**-62), 0], 0),
        ([2.0**-64, 2.0**-64], [1.5 * 2.0**-62, -(2.0**-62)], 0),
        ([2.0**-64, 2.0**-64], [1.5 * 2.0**-62, 2.0**-62], 2.5 * smallest),
        ([2.0**-63, 0], [2.0**-63, 0], smallest),
        # denormal or not after rounding to 24 bits with any exponent
        ([2.0**-63, 0, 2.0**-75, 0], [2.0**-63, 0, -(2.0**-76), 0], smallest),
        ([2.0**-63, 0, 2.0**-75, 0], [2.0**-63, 0, -1.5 * 2.0**-76, 0], 0),
    ):
        rows, weight = torch.tensor([x]).bfloat16(), torch.tensor([[w]]).bfloat16()
        with tiles():
            out = ops.grouped_matmul(rows, weight, torch.tensor([1], dtype=torch.int32), True, 1, 1, False)
        assert out.item() == expected, (x, w)


@pytest.mark.thorough
@pytest.mark.skipif(not COMPILED, reason="needs a CPU with AMX or AVX-512 for bfloat16")
@pytest.mark.parametrize("quant", [quant for quant in QUANTS if quant.activations is not None], ids=NAME)
def test_emulated_and_compiled_tiles_of_bytes_have_the_same_bits(quant: QuantConfig) -> None:
    for size, tokens in (((3, 2, 64, 48), 50), ((1, 1, 800, 20), 33)):
        config, weights, x, routing = quantized_problem(quant, size, tokens, "silu", False, torch.bfloat16)
        for w in (weights, moe_fn.prepare_weights(config, weights)):
            expected = call(native.EMULATED_AMX, config, w, x, routing)
            with tiles():
                found = call("amx", config, w, x, routing)
            assert equal_bits(found, expected)


@pytest.mark.parametrize("lacking", [None, "amx_tile", "amx_bf16", "amx_int8", "avx512_vbmi", "permission"])
def test_the_level_needs_the_cpu_and_the_system(monkeypatch: pytest.MonkeyPatch, lacking: str | None) -> None:
    names = ("amx_tile", "amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512_vbmi")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: name != lacking for name in names})
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: lacking != "permission")
    level = {None: "amx", "avx512_vbmi": "avx512"}.get(lacking, "avx512_bf16")
    assert native.best_level.__wrapped__() == level
