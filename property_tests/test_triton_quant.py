"""The Triton kernels with quantized weights, interpreted on the CPU, compared with float64 of the dequantized
weights.
"""

import dataclasses
from typing import Any

import numpy
import pytest
import torch

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("the kernels run on a CPU only in Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter
from triton_problems import ACTIVATIONS, DTYPES, Rows, routings

import moe_fn
from moe_fn.config import ActivationConfig, ActivationQuantConfig, QuantConfig
from moe_fn.config.activation import PRESETS
from moe_fn.kernels.triton.quant import codes
from moe_fn.kernels.triton.quant.inputs import Rows as Left
from moe_fn.kernels.triton.quant.inputs import quantize_by_expert, quantize_rows
from moe_fn.kernels.triton.quant.layer import QuantProblem, forward
from moe_fn.kernels.triton.quant.matrix import QuantMatrix, matrix_of
from moe_fn.kernels.triton.quant.products import quantized_product
from moe_fn.kernels.triton.quant.tiles import TABLES, coded_tile, rows_of_coded
from moe_fn.kernels.triton.slots import SortedSlots
from moe_fn.kernels.triton.support import problem_on
from moe_fn.kernels.triton.tile_tables import ARCHITECTURES, Tile
from moe_fn.ops.quantized_matmul import quantized_matmul
from moe_fn.quant.codes import Codes, decoded, encoded
from moe_fn.quant.inputs import rounded_rows
from moe_fn.quant.numbers import decode_e2m1, decode_e8m0
from moe_fn.stages._activation import activate
from moe_fn.testing import MoEProblem, assert_matches, configs, problems

pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered"
)  # in rows of no expert, which may have any values
FEW, FEWER = settings(max_examples=20), settings(max_examples=8)
FP8, GROUP = "fp8_e4m3", ActivationQuantConfig(scheme="fp8_e4m3", granularity="group", group_size=32)
TOKEN = ActivationQuantConfig(scheme=FP8, granularity="token")
STATIC = ActivationQuantConfig(scheme=FP8, granularity="tensor", static=True)
INT8_TOKEN = ActivationQuantConfig(scheme="int8", granularity="token")
NVFP4 = QuantConfig(scheme="nvfp4", granularity="group", group_size=16)
WEIGHT_ONLY = [
    QuantConfig(scheme="int4", granularity="group", group_size=32),
    QuantConfig(scheme="int4", granularity="group", group_size=16, zero_points=True),
    QuantConfig(scheme="int4", granularity="block", block_shape=(7, 64), zero_points=True),
    QuantConfig(scheme="int4", granularity="channel", zero_points=True),
    QuantConfig(scheme="int8", granularity="tensor"),
    QuantConfig(scheme="int8", granularity="group", group_size=16, zero_points=True),
    QuantConfig(scheme=FP8, granularity="block", block_shape=(16, 32)),
    QuantConfig(scheme=FP8, granularity="channel"),
    QuantConfig(scheme="mxfp4", granularity="group", group_size=32),
    QuantConfig(scheme="mxfp8", granularity="group", group_size=32),
    NVFP4,
]
BOTH = [
    QuantConfig(scheme=FP8, granularity="block", block_shape=(16, 32), activations=GROUP),
    QuantConfig(scheme=FP8, granularity="channel", activations=GROUP),
    QuantConfig(scheme=FP8, granularity="channel", activations=TOKEN),
    QuantConfig(scheme=FP8, granularity="tensor", activations=STATIC),
    QuantConfig(scheme="int8", granularity="channel", activations=INT8_TOKEN),
    QuantConfig(scheme="int8", granularity="group", group_size=64, activations=INT8_TOKEN),
]
SIZES = st.sampled_from([8, 24, 32, 40, 70])


@pytest.fixture(autouse=True, scope="module")
def casts_to_fp8_that_round() -> Any:
    """Replaces casts of the interpreter by torch's: it halves values whose rounding carries into the exponent (1.94
    becomes 1.0).
    """
    original = interpreter.InterpreterBuilder.create_fp_to_fp

    def cast(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target.scalar != tl.float8e4nv or source.dtype.scalar != tl.float32:
            return original(self, source, target, rounding)
        rounded = torch.from_numpy(numpy.ascontiguousarray(source.data)).to(torch.float8_e4m3fn)
        return interpreter.TensorHandle(rounded.view(torch.uint8).numpy(), tl.float8e4nv)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_fp_to_fp", cast)
        yield


@triton.jit
def _decode_kernel(q, values, scales, N: tl.constexpr, SCHEME: tl.constexpr, FORM: tl.constexpr, ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    q = tl.load(q + i)
    tl.store(values + i, codes.decode(q, ZERO, SCHEME))
    tl.store(scales + i, codes.scale_value(q, FORM))


def decoded_by_kernel(scheme: str, form: str = "float", zero: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    values, scales = torch.empty(256), torch.empty(256)
    _decode_kernel[(1,)](
        torch.arange(256, dtype=torch.uint8), values, scales, N=256, SCHEME=scheme, FORM=form, ZERO=zero
    )
    return values, scales


def test_every_code_is_its_value() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    fp8 = every.view(torch.float8_e4m3fn).float()
    values, scales = decoded_by_kernel(FP8, "e8m0")
    torch.testing.assert_close(values, fp8, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(scales, decode_e8m0(every, torch.float32), rtol=0, atol=0, equal_nan=True)
    values, scales = decoded_by_kernel("e2m1", "e4m3")
    assert torch.equal(values, decode_e2m1(every & 15, torch.float32))
    torch.testing.assert_close(scales, fp8, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(decoded_by_kernel("int8", zero=128.0)[0], every.view(torch.int8).float())
    assert torch.equal(decoded_by_kernel("uint8", zero=200.0)[0], every.float() - 200)


def matrix(quant: QuantConfig, weight: torch.Tensor, halves: int) -> tuple[QuantMatrix, torch.Tensor, Codes]:
    """Returns a matrix as the kernels take it, and in float64."""
    stored = encoded(quant, weight, halves)
    return matrix_of(quant, stored, halves), decoded(quant, stored, halves, torch.float64), stored


def routing(tokens: int) -> Rows:
    """Returns a routing with three experts, one of them without tokens, and a slot of no expert."""
    ids = torch.tensor([0, 2]).repeat(tokens, 1)
    ids[0, 0] = -1
    flat = torch.where(ids >= 0, ids, 3).flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(flat, minlength=4)[:3].cumsum(0)])
    return Rows(ids, 3, SortedSlots(order.int(), torch.where(flat < 3, inverse, -1).int(), starts.int(), 2), 0)


@given(
    routings(), SIZES, SIZES, st.sampled_from(ACTIVATIONS), st.sampled_from(WEIGHT_ONLY), DTYPES, *[st.booleans()] * 3
)
@example(routing(6), 40, 24, ACTIVATIONS[0], NVFP4, torch.float32, False, True, True)  # a global scale for each
@FEW
def test_weights_alone_in_codes(
    r: Rows, hidden: int, inner: int, activation: ActivationConfig, quant: QuantConfig, dtype: Any, interleaved: bool,
    biased: bool,
    keep: bool,
) -> None:  # fmt: skip
    make, columns = r.tensors(dtype), 2 * inner if activation.gated else inner
    halves = 2 if activation.gated and not interleaved else 1
    gate_up, wide_up, _ = matrix(quant, make(r.num_experts, columns, hidden, scale=hidden**-0.5), halves)
    down, wide_down, _ = matrix(quant, make(r.num_experts, hidden, inner, scale=inner**-0.5), 1)
    up_bias, down_bias = (r.by_expert(make(r.num_experts, n)) if biased else None for n in (columns, hidden))
    x, w = r.by_token(make(r.ids.shape[0], hidden)), r.by_slot(torch.rand(r.ids.shape))
    layer = QuantProblem(
        x=x, expert_ids=r.ids, expert_weights=w, gate_up=gate_up, down=down, gate_up_bias=up_bias, down_bias=down_bias,
        activation=activation, interleaved=interleaved,
    )  # fmt: skip
    y, pre = forward(layer, keep)
    live, e = slice(0, r.live), r.expert_of_row[: r.live]
    expected = torch.einsum("rk,rnk->rn", x[r.token_of_row[live]].double(), wide_up[e])
    expected = expected if up_bias is None else expected + up_bias[e].double()
    if keep:
        assert_matches(pre[live], expected, scale=0.1, name="pre")
    activated = activate(activation, expected, "interleaved" if interleaved else "packed")
    rows = torch.einsum("rk,rnk->rn", activated, wide_down[e])
    rows = rows if down_bias is None else rows + down_bias[e].double()
    slots = r.slots.slot_of_row[live].long()
    summed = torch.zeros(x.shape, dtype=torch.float64).index_add_(
        0, slots // r.slots.top_k, rows * w.flatten()[slots, None].double()
    )
    assert_matches(y, summed, scale=0.3)


def in_codes(
    a: ActivationQuantConfig, r: Rows, rows: torch.Tensor, static: torch.Tensor | None
) -> tuple[Left, torch.Tensor]:
    """Returns rows quantized by torch, for the kernels and in float64."""
    per_row = (
        None if static is None else static[r.expert_of_row.clamp(0, r.num_experts - 1)][: rows.shape[0]].unsqueeze(1)
    )
    rounded = rounded_rows(a, rows, torch.ones(rows.shape[0], 1, dtype=torch.bool), per_row)
    form: Any = {"token": "row", "group": "group", "tensor": "expert"}[a.granularity]
    scale = rounded.scale.contiguous() if static is None else static
    values = rounded.codes.to(torch.int8 if a.scheme == "int8" else torch.float8_e4m3fn)
    return Left(values=values, scale=scale, form=form, group=a.group_size or rows.shape[1]), rounded.floats().double()


def static_of(a: ActivationQuantConfig, r: Rows) -> torch.Tensor | None:
    return torch.rand(r.num_experts, generator=torch.Generator().manual_seed(1)) * 0.01 + 0.005 if a.static else None


each_of_both = pytest.mark.parametrize(
    "quant", BOTH, ids=lambda quant: f"{quant.scheme} {quant.granularity} {quant.activations.granularity}"
)


@pytest.mark.parametrize("tile", [Tile(16, 32, 32, 1, 1), Tile(64, 16, 32, 1, 1)], ids=["swapped", "not swapped"])
@each_of_both
def test_codes_times_codes_are_exact(quant: QuantConfig, tile: Tile) -> None:
    """Products are exact, so only float32 sums differ; with 70 inputs the last group is not whole."""
    r, a = routing(9), quant.activations
    assert a is not None
    stored, wide, _ = matrix(quant, r.tensors(torch.float32)(r.num_experts, 40, 70), 1)
    left, floats = in_codes(a, r, r.tensors(torch.float32)(r.ids.numel(), 70), static_of(a, r))
    out = quantized_product(left, stored, r.slots.ends, r.tile_map(tile.rows), tile, torch.float32)
    expected = torch.einsum("rk,rnk->rn", floats[: r.live], wide[r.expert_of_row[: r.live]])
    assert_matches(out[: r.live], expected, scale=float(expected.abs().mean()), tolerance=2e-6)


@each_of_both
@pytest.mark.parametrize(
    ("activation", "keep"), [("silu", False), ("swigluoai", False), ("relu2_no_mul", False), ("silu", True)]
)
def test_the_layer_quantizes_both_inputs(quant: QuantConfig, activation: str, keep: bool) -> None:
    """Compared with torch step by step: its codes, products in float64, and rows rounded to float16 in between.

    Tiles have one group, or none.
    """
    r, a, config = routing(9), quant.activations, PRESETS[activation]
    assert a is not None
    interleaved, make, columns = activation == "swigluoai", r.tensors(torch.float16), 80 if config.gated else 40
    gate_up, wide_up, _ = matrix(quant, make(3, columns, 70, scale=0.2), 2 if config.gated and not interleaved else 1)
    down, wide_down, _ = matrix(quant, make(3, 70, 40, scale=0.2), 1)
    x, first, second = make(r.ids.shape[0], 70), static_of(a, r), static_of(a, r)
    layer = QuantProblem(
        x=x, expert_ids=r.ids, expert_weights=torch.ones(r.ids.shape), gate_up=gate_up, down=down, gate_up_bias=None,
        down_bias=None,
        activation=config, interleaved=interleaved, rounding=a, gate_up_input_scale=first, down_input_scale=second,
    )  # fmt: skip
    y, pre = forward(layer, keep)
    e, slots = r.expert_of_row[: r.live], r.slots.slot_of_row[: r.live].long()
    hidden = torch.einsum("rk,rnk->rn", in_codes(a, r, x[r.token_of_row], first)[1][: r.live], wide_up[e])
    activated = activate(config, hidden, "interleaved" if interleaved else "packed").to(torch.float16)
    rows = torch.einsum("rk,rnk->rn", in_codes(a, r, activated.float(), second)[1][: r.live], wide_down[e])
    expected = torch.zeros(x.shape, dtype=torch.float64).index_add_(0, slots // 2, rows)
    assert_matches(y, expected, scale=float(expected.abs().mean()), tolerance=0.02 if a.scheme == "int8" else 0.05)
    close = (y.double() - expected).abs() <= 4e-3 * expected.abs().mean()
    assert close.double().mean() > 0.9, "many values have another code, not only those at ties"
    assert not keep or (pre[: r.live].double() - hidden).abs().max() < 1e-2


def rows_with_corners(columns: int) -> torch.Tensor:
    rows = torch.randn(12, columns, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 5, 12).unsqueeze(1)
    rows[0] = 0
    # a scale of 1, and of the next float
    rows[1, 0], rows[3] = 448.0, torch.nextafter(torch.tensor(448.0), torch.tensor(500.0))
    rows[2] = torch.arange(columns) % 17 - 8
    return rows


@pytest.mark.parametrize("columns", [1, 32, 70, 1100])  # the last is more than a program loads at once
@pytest.mark.parametrize(
    "a",
    [
        TOKEN,
        INT8_TOKEN,
        GROUP,
        ActivationQuantConfig(scheme=FP8, granularity="group", group_size=24, power_of_two_scales=True),
        ActivationQuantConfig(scheme="int8", granularity="group", group_size=32),
    ],
    ids=str,
)
def test_rows_are_quantized_to_the_codes_of_torch(a: ActivationQuantConfig, columns: int) -> None:
    rows, dtype = rows_with_corners(columns), torch.int8 if a.scheme == "int8" else torch.float8_e4m3fn
    found = quantize_rows(rows, dtype, a.group_size, a.power_of_two_scales)
    expected = rounded_rows(a, rows, torch.ones(12, 1, dtype=torch.bool), None)
    assert found.scale is not None
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.values.float(), expected.codes)


@pytest.mark.parametrize("sorted_rows", [False, True])
def test_rows_are_quantized_by_the_scales_of_their_experts(sorted_rows: bool) -> None:
    r = routing(6)
    static, x = torch.tensor([0.01, torch.nan, 0.5]), torch.randn(12 if sorted_rows else 6, 40)
    found = quantize_by_expert(x, torch.int8, static, r.slots.slot_of_row, r.ids, sorted_rows)
    rows = (x if sorted_rows else x[r.token_of_row])[: r.live]
    expected = (rows / static[r.expert_of_row[: r.live], None]).round().clamp(-128, 127)
    assert torch.equal(found.values[: r.live].float(), expected)


@pytest.mark.parametrize("quant", WEIGHT_ONLY, ids=lambda quant: f"{quant.scheme} {quant.granularity}")
def test_the_stages_decode_in_the_product(quant: QuantConfig) -> None:
    """The op of the stages, which layers with LoRA use, never decodes a whole weight. Rows of no expert are 0.

    With 70 inputs every granularity except the whole tensor has a second scale and a second zero point.
    """
    r = routing(5)
    weight = r.tensors(torch.float32)(3, 24, 70)
    rows, stored = r.by_row(r.tensors(torch.float32)(10, 70)), encoded(quant, weight, 2)
    out = quantized_matmul("triton", rows, stored, r.slots.ends, quant, 2)
    expected = torch.einsum(
        "rk,rnk->rn", rows[: r.live].double(), decoded(quant, stored, 2, torch.float64)[r.expert_of_row[: r.live]]
    )
    assert_matches(out[: r.live], expected, scale=1.0)
    assert not out[r.live :].any()


def on_triton(quant: QuantConfig) -> st.SearchStrategy[MoEProblem]:
    even = st.sampled_from((8, 20, 40))
    fixed: dict[str, Any] = {
        "hidden_size": even,
        "intermediate_size": even,
        "hidden_padding": st.sampled_from((0, 2)),
        "latent": None,
    }
    fixed |= {"weight_layout": "out_in", "chunk_tokens": None, "recompute": False, "backend": "triton", "opaque": False}
    fixed |= {"gate_dtype": "float32", "score_dtype": "float32"}
    return problems(configs(quant=quant, **fixed), dtype=torch.float32, tokens=st.integers(0, 9))


@given(st.sampled_from(WEIGHT_ONLY + BOTH).flatmap(on_triton))
@FEWER
def test_layers_equal_the_reference(example: MoEProblem) -> None:
    quant = example.config.quant
    assert quant is not None
    tolerance = None if quant.activations is None else 3e-2  # a value on the other side of a tie is one step off
    assert_matches(
        example.call(moe_fn.moe_forward), example.call(moe_fn.reference.moe_forward), scale=0.1, tolerance=tolerance
    )


@given(st.sampled_from(WEIGHT_ONLY).flatmap(on_triton))
@FEWER
def test_gradients_are_those_of_the_floats_that_codes_stand_for(example: MoEProblem) -> None:
    config, weights = moe_fn.dequantize_weights(example.config, example.weights)
    found = []
    for p in (example, example.replace(config=dataclasses.replace(config, backend="torch"), weights=weights)):
        p = p.replace(x=p.x.clone().requires_grad_())
        found.append(torch.autograd.grad(p.call(moe_fn.moe_forward).square().sum(), p.x)[0])
    assert_matches(*found, tolerance=1e-4, scale=1.0)


def test_every_row_of_the_tables_gives_tiles_for_every_size() -> None:
    for kind in TABLES:
        for arch in ARCHITECTURES:
            for width in (1,) if kind.startswith("coded") else (2, 4):
                assert rows_of_coded(kind, width, arch)[-1][0] == float("inf")
                for rows in (1, 100, 100_000):
                    for shared in ((), (8,) if width > 1 else (32,), (96, 32), (1024,)):
                        tile = coded_tile(kind, rows, 64, 70, 24, shared, width, arch)
                        assert tile.inner >= 32 and tile.columns <= 64
                        assert all(size % tile.inner == 0 or (width > 1 and tile.inner % size == 0) for size in shared)


@pytest.mark.parametrize(
    ("quant", "arch", "words"),
    [
        *((quant, arch, None) for quant in WEIGHT_ONLY for arch in ("sm_80", "gfx942")),
        *((quant, "sm_90", None) for quant in BOTH),
        (BOTH[0], "sm_80", "has no e4m3"),
        (BOTH[0], "gfx942", "has no e4m3"),
        (BOTH[-1], "sm_80", None),
        (QuantConfig(scheme="int4", granularity="group", group_size=12), "sm_90", "powers of two"),
        (QuantConfig(scheme="int4", granularity="group", group_size=8), "sm_90", "powers of two from 16 on"),
        (QuantConfig(scheme="int4", granularity="group", group_size=100), "sm_90", None),  # one group a matrix
        (QuantConfig(scheme="int4", granularity="channel", activations=INT8_TOKEN), "sm_90",
        "int8 activations with int4"),
        (QuantConfig(scheme="int8", granularity="channel", zero_points=True, activations=INT8_TOKEN), "sm_90",
        "with zero points"),
        (QuantConfig(scheme="int8", granularity="group", group_size=16, activations=INT8_TOKEN), "sm_90",
        "multiples of 32"),
        (
            QuantConfig(
                scheme="mxfp8", granularity="group", group_size=32,
                activations=ActivationQuantConfig(scheme="mxfp8", granularity="group", group_size=32),
            ),
            "sm_90",
            "mxfp8 activations",
        ),
        (
            QuantConfig(scheme=FP8, granularity="tensor",
            activations=ActivationQuantConfig(scheme=FP8, granularity="tensor")),
            "sm_90",
            "all activations of a call",
        ),
    ],
)  # fmt: skip
def test_what_the_kernels_do_not_compute_is_said(quant: QuantConfig, arch: str, words: str | None) -> None:
    found = problem_on(quant.json, (70, 40), arch)
    assert (found is None) if words is None else found is not None and words in found
