"""Laws of quantized experts: codes, scales and rounded inputs, compared with the reference and with the dequantized
weights.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from campaign.checking import share_of_bound
from hypothesis import given
from hypothesis import strategies as st
from support import law, leaves
from torch import Tensor

import moe_fn
from moe_fn import ActivationQuantConfig, MoEConfig, MoEWeights, QuantConfig
from moe_fn.config.quant import ACTIVATION_SCHEMES, SCHEMES
from moe_fn.quant import inputs, wire
from moe_fn.testing import assert_matches, configs, error_bound, problems, quants, weights_for
from moe_fn.testing.problem import MoEProblem

EVEN = st.sampled_from((2, 4, 8, 20, 40))
SIZES: dict[str, object] = {
    "hidden_size": EVEN,
    "intermediate_size": EVEN,
    "hidden_padding": st.sampled_from((0, 2)),
    "latent": None,
    "weight_layout": "out_in",
}


def problems_of(quant: QuantConfig, **fixed: object) -> st.SearchStrategy[MoEProblem]:
    fixed = {**SIZES, **({"chunk_tokens": None} if quant.rounds_by_call else {}), **fixed}
    return problems(configs(quant=quant, **fixed), tokens=st.integers(0, 7), logits="grid")


def ways_to_round(scheme: str) -> Iterator[ActivationQuantConfig | None]:
    """Returns every config of activations for a scheme, in groups of the scheme's size, or of 4."""
    yield None
    for rounded in SCHEMES[scheme].activations:
        granularities, size = ACTIVATION_SCHEMES[rounded].granularities, ACTIVATION_SCHEMES[rounded].group_size
        for granularity, static, powers in itertools.product(granularities, (False, True), (False, True)):
            group_size = (size or 4) if granularity == "group" else None
            with contextlib.suppress(ValueError):  # not a valid combination
                yield ActivationQuantConfig(
                    scheme=rounded,  # type: ignore[arg-type]
                    granularity=granularity,  # type: ignore[arg-type]
                    group_size=group_size,
                    static=static,
                    power_of_two_scales=powers,
                )


def every_quant(scheme: str) -> Iterator[QuantConfig]:
    """Returns every granularity of a scheme, with and without zero points, with every config of activations."""
    row = SCHEMES[scheme]
    zero_points = (False, True) if row.zero_points else (False,)
    for granularity, zero, activations in itertools.product(row.granularities, zero_points, ways_to_round(scheme)):
        yield QuantConfig(
            scheme=scheme,  # type: ignore[arg-type]
            granularity=granularity,  # type: ignore[arg-type]
            group_size=(row.group_size or 4) if granularity == "group" else None,
            block_shape=(3, 8) if granularity == "block" else None,
            zero_points=zero,
            activations=activations,
        )


EVERY_QUANT = tuple(quant for scheme in SCHEMES for quant in every_quant(scheme))
PROBLEMS = quants().flatmap(problems_of)
WEIGHT_ONLY = quants(activations=False).flatmap(problems_of)


@law(PROBLEMS)
def test_quantized_layers_equal_the_reference(problem: MoEProblem) -> None:
    """The error is within the problem's bound, which includes inputs that float32 may round to the next code; a fixed
    tolerance does not.
    """
    y, expected = problem.call(moe_fn.moe_forward), problem.call(moe_fn.reference.moe_forward)
    assert share_of_bound(y, expected, error_bound(problem)) <= 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_way_to_quantize_equals_the_reference(scheme: str) -> None:
    """Draws have few of the configs; this test has all of them."""
    for number, quant in enumerate(quant for quant in EVERY_QUANT if quant.scheme == scheme):
        config = MoEConfig(
            num_experts=3,
            top_k=2,
            hidden_size=32,
            intermediate_size=32,
            quant=quant,
            gate_up_layout=("packed", "interleaved")[number % 2],
        )
        generator = torch.Generator().manual_seed(number)
        x, logits = torch.randn(5, 32, generator=generator), torch.randint(-4, 5, (5, 3), generator=generator).float()
        problem = MoEProblem(config=config, weights=weights_for(config, generator), x=x, logits=logits)
        test_quantized_layers_equal_the_reference.check(problem)


@law(WEIGHT_ONLY)
def test_a_quantized_layer_equals_the_layer_of_the_dequantized_weights(problem: MoEProblem) -> None:
    config, weights = moe_fn.dequantize_weights(problem.config, problem.weights)
    ours, theirs = with_gradients(problem), with_gradients(problem.replace(config=config, weights=weights))
    found = []
    for p in (ours, theirs):
        y = p.call(moe_fn.moe_forward)
        inputs = [t for t in (p.x, p.logits, p.weights.gate_up_bias, p.weights.down_bias) if t is not None]
        found.append((y, torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)))
    assert_matches(found[0][0], found[1][0], tolerance=1e-5, scale=0.1)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_matches(one.nan_to_num(), other.nan_to_num(), tolerance=1e-4, scale=1.0)


def with_gradients(problem: MoEProblem) -> MoEProblem:
    """Returns the problem with all float32 and float64 tensors as leaves that require a gradient."""
    weights = torch.utils._pytree.tree_map(_leaf, problem.weights)
    return problem.replace(
        x=_leaf(problem.x), logits=None if problem.logits is None else _leaf(problem.logits), weights=weights
    )


def _leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_() if t.dtype in (torch.float32, torch.float64) else t


@law(PROBLEMS)
def test_gradients_pass_through_the_rounding_of_inputs(problem: MoEProblem) -> None:
    """Gradients equal those of the reference, in which the rounding is an addend without gradient. Problems
    with an input at a tie, or at a step of a derivative, are skipped.
    """
    bound = error_bound(problem)
    if bound.tied or bound.jumps:
        return
    p = with_gradients(problem)
    inputs = [t for t in (p.x, p.logits, p.weights.gate_up_bias, p.weights.down_bias) if t is not None]
    ours, theirs = (
        torch.autograd.grad(p.call(forward).sum(), inputs, allow_unused=True)
        for forward in (moe_fn.moe_forward, moe_fn.reference.moe_forward)
    )
    for one, other in zip(ours, theirs, strict=True):
        if one is not None and other is not None:
            assert_matches(one.nan_to_num(), other.nan_to_num(), tolerance=1e-4, scale=1.0)


DTYPES = st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16))


@law(quants(of_call=False), DTYPES, st.integers(0, 2**20), st.integers(0, 3), st.sampled_from((40, 7)))
def test_rows_arrive_as_the_experts_round_them(
    quant: QuantConfig, dtype: torch.dtype, seed: int, count: int, width: int
) -> None:
    """Rounding rows that were rounded for the transfer to another rank changes nothing; a rank may have no rows."""
    config = MoEConfig(num_experts=2, top_k=1, hidden_size=40, intermediate_size=20, quant=quant)
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    codes = wire.travelling(config, dtype, weighted=True)
    received = wire.packed(codes, rows)
    assert codes is None or received.shape == (count, wire.bytes_of_row(codes, width))
    arrived = wire.unpacked(codes, received, rows, lambda rows, received: received)
    if quant.activations is not None and not quant.activations.static:
        present = torch.ones(count, 1, dtype=torch.bool)
        once, twice = (inputs.rounded_rows(quant.activations, t, present, None).floats() for t in (rows, arrived))
        assert_matches(twice.to(dtype), once.to(dtype))


@pytest.mark.parametrize(("count", "width"), itertools.product((0, 1, 3), (40, 7)))
def test_rows_arrive_however_they_are_rounded(count: int, width: int) -> None:
    ways = {
        quant.activations: quant
        for quant in EVERY_QUANT
        if quant.activations is not None and not quant.activations.is_of_call
    }
    for quant in ways.values():
        test_rows_arrive_as_the_experts_round_them.check(quant, torch.float32, 0, count, width)


@law(quants(activations=False), st.integers(0, 2**20), st.booleans())
def test_codes_are_the_nearest_to_the_weights(quant: QuantConfig, seed: int, tied: bool) -> None:
    config, weights, floats = (halfway if tied else drawn)(quant, seed)
    _, again = moe_fn.dequantize_weights(config, weights)
    for name in ("gate_up", "down"):
        w, q = getattr(floats, name), getattr(again, name)
        step = steps(config, weights, name)
        assert ((w - q).abs() <= step * 1.001).all(), name


def drawn(quant: QuantConfig, seed: int) -> tuple[MoEConfig, MoEWeights, MoEWeights]:
    config = MoEConfig(num_experts=2, top_k=1, hidden_size=40, intermediate_size=20)
    floats = weights_for(config, seed, bias=False)
    spread = torch.exp(torch.randn(2, 1, 40, generator=torch.Generator().manual_seed(seed)))
    floats = dataclasses.replace(floats, gate_up=floats.gate_up * spread, down=floats.down * (torch.arange(20) > 5))
    return *moe_fn.quantize_weights(config, floats, quant), floats


def halfway(quant: QuantConfig, seed: int) -> tuple[MoEConfig, MoEWeights, MoEWeights]:
    """Returns weights that are codes around a zero point, or halfway between two codes; the zero point and the ends of
    each tile are among them.
    """
    config, top = MoEConfig(num_experts=2, top_k=1, hidden_size=40, intermediate_size=20), 2**quant.row.bits - 1
    generator = torch.Generator().manual_seed(seed)
    zero = float(torch.randint(0, top, (), generator=generator)) + 0.5

    def matrix(*shape: int) -> Tensor:
        units = torch.randint(0, 2 * top + 1, shape, generator=generator) / 2 - zero
        units[..., :: quant.tile[1] or shape[2]], units[..., 1 :: quant.tile[1] or shape[2]] = -zero, top - zero
        return units / 4

    floats = MoEWeights(gate_up=matrix(2, 40, 40), down=matrix(2, 40, 20))
    return *moe_fn.quantize_weights(config, floats, quant), floats


def steps(config: MoEConfig, weights: MoEWeights, name: str) -> Tensor:
    """Returns half the distance of each code's value to its farther neighbour; saturated values (mx scales,
    zero points) may be farther off.
    """
    quant = config.quant
    assert quant is not None and weights.quant is not None
    stored = moe_fn.quant.codes.codes_of(weights, name)
    halves = moe_fn.quant.tiles.halves_of(config, name)
    ones = torch.ones_like(moe_fn.quant.codes.decoded(quant, stored, halves, torch.float32))
    scale = moe_fn.quant.codes.decode_scale(quant, stored.scale, torch.float32)
    unit = moe_fn.quant.tiles.expand_tiles(scale, quant.tile, halves, *ones.shape[1:]).abs()
    if stored.global_scale is not None:
        unit = unit * moe_fn.quant.tiles.expand_tiles(stored.global_scale, (None, None), halves, *ones.shape[1:])
    number = moe_fn.quant.codes.decoded(quant, stored, halves, torch.float32).abs() / unit
    if quant.row.element in ("int8", "int4"):  # a zero point is an integer too
        return unit * (1.0 if quant.zero_points or quant.scheme == "int4" else 0.5)
    mantissa = {"e4m3": 3, "e2m1": 1}[quant.row.element]
    least = {"e4m3": 2.0**-9, "e2m1": 0.5}[quant.row.element]
    spacing = (2.0 ** (torch.floor(torch.log2(number.clamp(min=1e-30))) - mantissa)).clamp(min=least)
    largest = moe_fn.quant.numbers.NUMBERS[quant.row.element].largest
    saturated = number == largest
    return unit * torch.where(saturated, 2 * spacing + (2.0 if quant.scheme == "mxfp4" else 0), spacing / 2 * 1.01)


@law(quants(activations=False), st.integers(0, 2**20))
def test_quantizing_dequantized_weights_changes_nothing(quant: QuantConfig, seed: int) -> None:
    config, weights, _ = drawn(quant, seed)
    plain, floats = moe_fn.dequantize_weights(config, weights)
    _, again = moe_fn.dequantize_weights(*moe_fn.quantize_weights(plain, floats, quant))
    for name in ("gate_up", "down"):
        assert_matches(getattr(again, name), getattr(floats, name), tolerance=1e-6)


@law(quants(activations=False), st.integers(0, 2**20))
def test_calibration_does_not_increase_the_rounding_error(quant: QuantConfig, seed: int) -> None:
    """The error is weighted by the statistics of the calibration: the mean square of each expert's inputs."""
    config, weights, floats = drawn(quant, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 40, generator=generator) * torch.exp(torch.randn(40, generator=generator))
    plain = dataclasses.replace(config, quant=None)
    calibration = moe_fn.calibrate(plain, floats, x, torch.randn(9, 2, generator=generator))
    _, better = moe_fn.quantize_weights(plain, floats, quant, calibration)
    for name in ("gate_up", "down"):
        importance = getattr(calibration, f"{name}_mean_square").unsqueeze(1)
        halves = moe_fn.quant.tiles.halves_of(config, name)
        errors = [
            (getattr(moe_fn.dequantize_weights(config, w)[1], name) - getattr(floats, name)).square() * importance
            for w in (better, weights)
        ]
        ours, theirs = (moe_fn.quant.tiles.by_tile(e, quant.tile, halves).sum(-1) for e in errors)
        assert (ours <= theirs * 1.0001).all(), name  # each tile, also where two tiles share a byte


@given(st.data())
def test_static_scales_cover_what_was_seen(data: st.DataObject) -> None:
    scheme = data.draw(st.sampled_from(("fp8_e4m3", "int8", "nvfp4")))
    groups = {"granularity": "group", "group_size": 16} if scheme == "nvfp4" else {"granularity": "tensor"}
    activations = moe_fn.ActivationQuantConfig(scheme=scheme, static=True, **groups)  # type: ignore[arg-type]
    quant = QuantConfig(scheme=scheme, **groups, activations=activations)  # type: ignore[arg-type]
    config = MoEConfig(num_experts=2, top_k=1, hidden_size=32, intermediate_size=32)
    floats = weights_for(config, data.draw(st.integers(0, 99)), bias=False)
    x, logits = torch.randn(20, 32), torch.randn(20, 2)
    small, codes = moe_fn.quantize_weights(config, floats, quant, moe_fn.calibrate(config, floats, x, logits))
    plain = dataclasses.replace(small, quant=dataclasses.replace(quant, activations=None))
    assert codes.quant is not None
    no_scales = dataclasses.replace(
        codes, quant=dataclasses.replace(codes.quant, gate_up_input_scale=None, down_input_scale=None)
    )
    y, exact = moe_fn.moe_forward(small, codes, x, logits), moe_fn.moe_forward(plain, no_scales, x, logits)
    assert_matches(y, exact, tolerance={"int8": 0.05, "fp8_e4m3": 0.1, "nvfp4": 0.3}[scheme])


@given(st.data())
def test_what_ranks_and_bytes_cannot_cut_is_refused(data: st.DataObject) -> None:
    quant = data.draw(quants(of_call=False))
    slices = data.draw(st.sampled_from((2, 3, 4)))
    width = data.draw(st.sampled_from((8, 12, 24, 96)))
    outputs, inputs = quant.tile
    fits = width % slices == 0 and all(
        (width // slices) % (size or 1) == 0 for size in (outputs, inputs, quant.per_byte)
    )
    parallel = moe_fn.ParallelConfig(tp=moe_fn.RankGroup(name="0", size=slices, rank=0))
    try:
        MoEConfig(num_experts=2, top_k=1, hidden_size=8, intermediate_size=width, quant=quant, parallel=parallel)
        refused = False
    except ValueError:
        refused = True
    assert refused == (not fits)


def test_leaves_that_have_gradients_are_floats() -> None:
    config = MoEConfig(
        num_experts=2,
        top_k=1,
        hidden_size=8,
        intermediate_size=8,
        quant=QuantConfig(scheme="int8", granularity="channel"),
    )
    assert all(t.dtype == torch.float32 for t in leaves(weights_for(config)))
