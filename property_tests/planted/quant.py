"""Planted bugs of codes, scales and the rounding of inputs."""

from dataclasses import replace
from typing import Any

import torch

from moe_fn.ops import quantized_matmul
from moe_fn.quant import codes, inputs, numbers, tiles, wire
from moe_fn.quant.numbers import Number
from planted.bugs import PlantedBug, after, before, instead


def _with_number(element: str, change: Any) -> Any:
    """A bug that calls the function with one row of the table of number formats changed."""

    def broken(f: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            before_, numbers.NUMBERS[element] = numbers.NUMBERS[element], change(numbers.NUMBERS[element])
            try:
                return f(*args, **kwargs)
            finally:
                numbers.NUMBERS[element] = before_

        return run

    return broken


def _round_down(number: Number) -> Number:
    return replace(number, encode=lambda values: number.encode(values - 0.499))


def _another(values: Any, which: Any) -> Any:
    return values, (which + 3) % len(values)


FLOATS = "a_quantized_layer_equals_the_layer_of_the_dequantized_weights"
BUGS = (
    PlantedBug(
        "quantized_layers_equal_the_reference",
        "the two codes of a byte are exchanged",
        numbers.unpack_halves,
        after(lambda c, *a: c.flip(-1)),
    ),
    PlantedBug(
        "quantized_layers_equal_the_reference",
        "up is decoded with the scales of gate",
        tiles.expand_tiles,
        before(
            lambda scale, tile, halves, *size: (
                scale.unflatten(1, (halves, -1))[:, :1].repeat(1, halves, 1, 1).flatten(1, 2),
                tile,
                halves,
                *size,
            )
        ),
    ),
    PlantedBug(
        "quantized_layers_equal_the_reference",
        "zero points are taken for 0",
        codes.decoded,
        before(
            lambda quant, stored, *a: (
                quant,
                replace(stored, zero_point=None if stored.zero_point is None else stored.zero_point * 0),
                *a,
            )
        ),
    ),
    PlantedBug(
        "quantized_layers_equal_the_reference",
        "the global scale is dropped",
        codes.codes_of,
        after(lambda stored, *a: replace(stored, global_scale=None)),
    ),
    PlantedBug(
        "quantized_layers_equal_the_reference",
        "e8m0 scales are too small by a factor of 2",
        numbers.decode_e8m0,
        after(lambda values, *a: values / 2),
    ),
    PlantedBug(
        "quantized_layers_equal_the_reference",
        "inputs are rounded towards minus infinity",
        inputs.round_to,
        before(lambda scheme, units: (scheme, units - 0.499)),
    ),
    PlantedBug(
        FLOATS,
        "products are too large by a factor of 1.01",
        quantized_matmul.quantized_matmul,
        after(lambda y, *a: y * 1.01),
    ),
    PlantedBug(
        "gradients_pass_through_the_rounding_of_inputs",
        "rounding has no gradient",
        inputs.straight_through,
        instead(lambda r, x: r),
    ),
    PlantedBug(
        "rows_arrive_as_the_experts_round_them",
        "rows of float64 are sent with scales of float32",
        wire.travelling,
        before(lambda config, dtype: (config, torch.float32)),
    ),
    PlantedBug(
        "rows_arrive_as_the_experts_round_them",
        "an empty tensor of bytes keeps its strides",
        wire._contiguous_copy,
        instead(lambda t: t.contiguous()),
    ),
    PlantedBug(
        "codes_are_the_nearest_to_the_weights",
        "codes are rounded down",
        codes.encoded,
        _with_number("int8", _round_down),
    ),
    PlantedBug(
        "codes_are_the_nearest_to_the_weights",
        "a tie beyond the last code wraps",
        numbers.codes_around,
        instead(lambda zeros, units, top: (units.round() + zeros).to(torch.uint8)),
    ),
    PlantedBug(
        "calibration_does_not_increase_the_rounding_error",
        "a scale that is not the best one is chosen",
        codes._chosen,
        before(_another),
    ),
    PlantedBug(
        "quantizing_dequantized_weights_changes_nothing",
        "scales are too large by an eighth",
        codes._amax,
        after(lambda amax, *a: amax * 1.125),
    ),
)
