"""Every row of the tables of quantization schemes: scales, zeros, dtypes, and the leaves that are checked."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import moe_fn
from moe_fn import ActivationQuantConfig, MoEConfig, QuantConfig, RouterConfig
from moe_fn.config.quant import ACTIVATION_SCHEMES, ELEMENTS, SCALES, SCHEMES
from moe_fn.quant.codes import decode_scale
from moe_fn.quant.inputs import rounded_rows
from moe_fn.quant.numbers import NUMBERS
from moe_fn.quant.tiles import by_tile, expand_tiles, halves_of
from moe_fn.quant.wire import travelling
from moe_fn.reference.quant import VALUES
from moe_fn.testing import weights_for

SIZES: dict[str, Any] = {"num_experts": 2, "top_k": 1, "hidden_size": 64, "intermediate_size": 32}
CONFIG = MoEConfig(**SIZES)
# Relative deviation of a scale of this format from the one that maps the largest value of a tile to the largest code.
SLACK = {"float": 1.002, "e4m3": 1.07, "e8m0": 2.0}


def quants_of(scheme: str) -> Iterator[QuantConfig]:
    row = SCHEMES[scheme]
    for granularity in row.granularities:
        sizes = {"group": {"group_size": row.group_size or 16}, "block": {"block_shape": (8, 16)}}.get(granularity, {})
        for zero_points in (False, True)[: 1 + row.zero_points]:
            yield QuantConfig(scheme=scheme, granularity=granularity, zero_points=zero_points, **sizes)


def activations_of(scheme: str) -> Iterator[ActivationQuantConfig]:
    row = ACTIVATION_SCHEMES[scheme]
    for granularity in row.granularities:
        yield ActivationQuantConfig(
            scheme=scheme,
            granularity=granularity,
            group_size=(row.group_size or 16) if granularity == "group" else None,
        )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_take_the_largest_weight_of_a_tile_to_the_largest_code(scheme: str) -> None:
    floats = weights_for(CONFIG, bias=False)
    floats = dataclasses.replace(
        floats, **{name: getattr(floats, name) * torch.tensor([1, 0]).view(2, 1, 1) for name in ("gate_up", "down")}
    )
    for quant in quants_of(scheme):
        config, weights = moe_fn.quantize_weights(CONFIG, floats, quant)
        _, again = moe_fn.dequantize_weights(config, weights)
        largest = 2**quant.row.bits - 1 if quant.zero_points else NUMBERS[quant.row.element].largest
        for name in ("gate_up", "down"):
            w, halves = getattr(floats, name), halves_of(config, name)
            unit = expand_tiles(
                decode_scale(quant, getattr(weights.quant, f"{name}_scale"), torch.float32),
                quant.tile,
                halves,
                *w.shape[1:],
            ).abs()
            if scheme == "nvfp4":
                unit = unit * expand_tiles(
                    getattr(weights.quant, f"{name}_global_scale"), (None, None), halves, *w.shape[1:]
                )
            tiles = by_tile(w[:1] / unit[:1], quant.tile, halves)
            reached = (
                tiles.amax(-1).clamp(min=0) - tiles.amin(-1).clamp(max=0) if quant.zero_points else tiles.abs().amax(-1)
            )
            assert (
                (reached * SLACK[quant.row.scale] >= largest) & (reached <= largest * SLACK[quant.row.scale])
            ).all(), (quant, name)
            assert not getattr(again, name)[1].any(), (quant, name)  # zeros remain zeros


@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
def test_scales_take_the_largest_input_to_the_largest_code(scheme: str) -> None:
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [30.0], [0.0]])
    largest, slack = (
        NUMBERS[ACTIVATION_SCHEMES[scheme].element].largest,
        SLACK[ACTIVATION_SCHEMES[scheme].scale],
    )
    for activations in activations_of(scheme):
        found = rounded_rows(activations, rows, torch.ones(3, 1, dtype=torch.bool), None)
        groups = (1, -1) if activations.granularity == "tensor" else (3, -1, activations.group_size or 64)
        reached = (rows.view(groups) / found.scale.view(*groups[:-1], 1)).abs().amax(-1).flatten()
        reached = reached[: len(reached) * 2 // 3] if len(reached) > 1 else reached  # the last row is zero
        assert ((reached * slack >= largest) & (reached <= largest * slack)).all(), activations
        assert found.floats().shape == rows.shape and not found.floats()[2].any(), activations


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_leaf_beside_codes_has_one_shape_and_its_dtypes(scheme: str) -> None:
    floats, x, logits = weights_for(CONFIG, bias=False), torch.randn(5, 64), torch.randn(5, 2)
    calibration = moe_fn.calibrate(CONFIG, floats, x, logits)
    for quant in (*quants_of(scheme), *statics_of(scheme)):
        config, weights = moe_fn.quantize_weights(CONFIG, floats, quant, calibration)
        assert weights.quant is not None
        leaves = {field.name: getattr(weights.quant, field.name) for field in dataclasses.fields(weights.quant)}
        for name, leaf in leaves.items():
            if leaf is None:
                continue
            for wrong in (
                torch.zeros(leaf.shape, dtype=torch.float64),
                torch.cat([leaf.view(torch.uint8)] * 2).view(leaf.dtype),
            ):
                with pytest.raises(ValueError, match=rf"weights\.quant\.{name} is "):
                    changed = dataclasses.replace(weights, quant=dataclasses.replace(weights.quant, **{name: wrong}))
                    moe_fn.moe_forward(config, changed, x, logits)


def statics_of(scheme: str) -> Iterator[QuantConfig]:
    for rounded in SCHEMES[scheme].activations:
        if rounded == "nvfp4" or "tensor" in ACTIVATION_SCHEMES[rounded].granularities:
            sizes = {"granularity": "group", "group_size": 16} if rounded == "nvfp4" else {"granularity": "tensor"}
            for quant in quants_of(scheme):
                yield dataclasses.replace(
                    quant, activations=ActivationQuantConfig(scheme=rounded, static=True, **sizes)
                )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_travel_rounded_unless_something_else_is_yet_to_see_them(scheme: str) -> None:
    by_token = next(iter(quants_of(scheme)))
    for rounded in SCHEMES[scheme].activations:
        for activations in activations_of(rounded):
            if activations.is_of_call:
                continue
            quant = dataclasses.replace(by_token, activations=activations)
            for weight_on in ("input", "output"):
                config = MoEConfig(**SIZES, quant=quant, router=RouterConfig(weight_on=weight_on))
                for weighted in (False, True):
                    as_they_are = weight_on == "input" and not weighted
                    assert travelling(config, torch.float32, weighted) == (None if as_they_are else activations)
                assert travelling(config, torch.float64, weighted=True) is None


@pytest.mark.parametrize("name", NUMBERS)
def test_codes_decode_to_the_dtype_that_is_asked_for(name: str) -> None:
    number = NUMBERS[name]
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert number.decode(number.encode(torch.tensor([0.0, 1.0, -2.0])), dtype).dtype == dtype
        assert number.decode(number.encode(torch.tensor([0.0, 1.0, -2.0])), dtype).tolist() == [0.0, 1.0, -2.0]


def test_the_tables_are_those_of_the_publications() -> None:
    """The reference and the strategies read the rows too, so their values are repeated here."""
    found = {name: (row.element, row.bits, row.scale, row.group_size) for name, row in SCHEMES.items()}
    assert found == {
        "fp8_e4m3": ("e4m3", 8, "float", None),
        "int8": ("int8", 8, "float", None),
        "int4": ("int4", 4, "float", None),
        "mxfp4": ("e2m1", 4, "e8m0", 32),  # OCP microscaling formats 1.0
        "mxfp8": ("e4m3", 8, "e8m0", 32),
        "nvfp4": ("e2m1", 4, "e4m3", 16),  # compressed-tensors
    }
    for name, inputs in ACTIVATION_SCHEMES.items():
        assert (inputs.element, inputs.bits, inputs.scale, inputs.group_size) == found[name], name
    assert set(ELEMENTS) == set(NUMBERS) == set(VALUES) == {row.element for row in SCHEMES.values()}
    assert set(SCALES) == {row.scale for row in SCHEMES.values()}
