"""Which quantized layers the kernels compute.

Apart from them, for it is asked while tracing, where Triton may not be imported.
"""

from moe_fn.config import QuantConfig
from moe_fn.kernels.triton.quant.tiles import LEAST_STEP, fitting_step

LEAST_TILE = 16  # scales of 8 inputs take so many registers that tiles of 16 rows spill
STEPS = (32, 64, 128)  # inner sizes of tiles
NO_E4M3 = ("sm_75", "sm_80", "gfx942")  # the last has another fp8, fnuz


def problem(quant: QuantConfig, inputs: tuple[int, int], arch: str) -> str | None:
    """Why the kernels do not compute a layer, in words; None if they do. inputs: those of gate_up and of down."""
    checks = (problem_of_weights(quant, inputs), _of_activations(quant, inputs, arch))
    return next((f"quant: {text}" for text in checks if text is not None), None)


def problem_of_weights(quant: QuantConfig, inputs: tuple[int, ...]) -> str | None:
    """Why the products do not decode a layer's weights, or one matrix; None if they do."""
    tile_in = quant.tile[1]
    if (
        tile_in is None
        or all(tile_in >= size for size in inputs)
        or (tile_in >= LEAST_TILE and all(fitting_step(s, tile_in) for s in STEPS))
    ):
        return None
    return (
        f"a scale of {tile_in} inputs; the Triton kernels take powers of two from {LEAST_TILE} on, and multiples of "
        f"{LEAST_STEP}"
    )


def _of_activations(quant: QuantConfig, inputs: tuple[int, int], arch: str) -> str | None:
    """Codes times codes: fp8 and int8, where no scale changes within a step."""
    a, tile_in = quant.activations, quant.tile[1]
    if a is None:
        return None
    if a.scheme != quant.scheme or quant.zero_points:
        weights = f"{quant.scheme} with zero points" if quant.zero_points else quant.scheme
        return (
            f"{a.scheme} activations with {weights}; the Triton kernels take fp8_e4m3 with fp8_e4m3 and int8 with int8"
        )
    if a.scheme not in ("fp8_e4m3", "int8"):
        return f"{a.scheme} activations; the Triton kernels take fp8_e4m3 and int8"
    if a.scheme == "fp8_e4m3" and arch in NO_E4M3:
        return f"fp8_e4m3 activations on {arch}, whose matrix unit has no e4m3; weights alone may be fp8_e4m3 there"
    if a.is_of_call:
        return (
            "one scale computed for all activations of a call; the Triton kernels take static ones, and those of "
            "tokens and groups"
        )
    shared = [size for size in (tile_in, a.group_size) if size is not None and any(size < k for k in inputs)]
    if any(size % LEAST_STEP for size in shared):
        return f"activations in codes with scales of {shared} inputs; the Triton kernels take multiples of {LEAST_STEP}"
    return None
