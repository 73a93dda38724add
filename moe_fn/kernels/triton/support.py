"""Which layers and which routers the Triton kernels compute: devices, dtypes and the options that they know.

Apart from the kernels, for it is asked while tracing, where Triton may not be imported.
"""

import functools
import importlib.util
import math

import torch

from moe_fn.config import MoEConfig
from moe_fn.config.moe import config_of_json
from moe_fn.config.quant import QuantConfig, quant_of_json
from moe_fn.kernels import options
from moe_fn.kernels.options import (
    ANY,
    FUSED_ACTIVATION,
    FUSED_GROUPS,
    FUSED_LAYER,
    FUSED_ROUTER,
    Known,
    unknown_layer_option,
    unknown_option,
)
from moe_fn.kernels.triton.quant.tiles import LEAST_STEP, fitting_step
from moe_fn.kernels.triton.tiles import architecture_of
from moe_fn.torch_compat import constant_while_tracing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LANES = 1024  # of one program, in 4 warps: 8 keys of 8 bytes a thread. A row of 2048 spills on gfx942 (4 KB a thread)
MOST_GROUPS = 32  # groups are ranked by comparing each with each
LEAST_TILE = 16  # scales of 8 inputs take so many registers that tiles of 16 rows spill
STEPS = (32, 64, 128)  # inner sizes of tiles
NO_E4M3 = ("sm_75", "sm_80", "gfx942")  # the last has another fp8, fnuz
_NAME = "the Triton kernels"

EXPERTS: Known = {**FUSED_LAYER}
ACTIVATION: Known = {**FUSED_ACTIVATION}  # activation.py
QUANT: Known = {  # quant/codes.py
    "scheme": ("fp8_e4m3", "int8", "int4", "mxfp4", "mxfp8", "nvfp4"),
    "granularity": ("tensor", "channel", "group", "block"),
    "group_size": ANY,
    "block_shape": ANY,
    "zero_points": (False, True),
    "activations": ANY,  # ROUNDING
}
ROUNDING: Known = {  # quant/inputs.py
    "scheme": ("fp8_e4m3", "int8"),
    "granularity": ("tensor", "token", "group"),
    "group_size": ANY,
    "static": (False, True),
    "power_of_two_scales": (False, True),
}
ROUTER: Known = {**FUSED_ROUTER}  # top_k.py
GROUPS: Known = {**FUSED_GROUPS, "count": range(1, MOST_GROUPS + 1)}


def problem(device: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels do not run for this device and dtype; None if they do."""
    if device not in ("cuda", "cpu"):
        return f"the Triton kernels run on CUDA and ROCm devices, not on {device}"
    if dtype not in DTYPES:
        return f"the Triton kernels compute in float32, bfloat16 and float16, not in {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device == "cpu" and not interpreted():
        return (
            "the Triton kernels run on the CPU only under Triton's interpreter (start Python with TRITON_INTERPRET=1), "
            "for tests"
        )
    return None


def interpreted() -> bool:
    """Whether kernels made from now on are Triton's interpreter's."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@constant_while_tracing
def experts_problem(config: str) -> str | None:
    """Why the op of dispatch, experts and combine does not compute a layer (`MoEConfig.json`); None if it does, or if
    `quant_problem` says the rest.
    """
    return _experts_problem(config)


@functools.lru_cache(maxsize=1024)
def _experts_problem(config: str) -> str | None:
    return unknown_layer_option(_NAME, config_of_json(config), EXPERTS, ACTIVATION)


@constant_while_tracing
def quant_problem(quant: str, hidden: int, intermediate: int, device: str) -> str | None:
    """Why the kernels do not compute quantized experts (`QuantConfig.json`) on a device that runs them; None if they
    do.
    """
    return problem_on(quant, (hidden, intermediate), architecture_of(torch.device(device)))


@functools.lru_cache(maxsize=1024)
def problem_on(quant: str, inputs: tuple[int, int], arch: str) -> str | None:
    """The same for an architecture; inputs: those of gate_up and of down."""
    config = quant_of_json(quant)
    checks = (_problem_of_weights(config, inputs), _problem_of_rounding(config, inputs, arch))
    return next((f"quant: {text}" for text in checks if text is not None), None)


@functools.lru_cache(maxsize=1024)
def decodes(quant: str, inputs: int) -> bool:
    """Whether a product of the kernels decodes weights (`QuantConfig.json`) with so many inputs."""
    return _problem_of_weights(quant_of_json(quant), (inputs,)) is None


def _problem_of_weights(quant: QuantConfig, inputs: tuple[int, ...]) -> str | None:
    """Why the products do not decode a layer's weights, or one matrix; None if they do."""
    wrong, tile_in = unknown_option(_NAME, quant, QUANT), quant.tile[1]
    if (
        wrong is not None
        or tile_in is None
        or all(tile_in >= size for size in inputs)
        or (tile_in >= LEAST_TILE and all(fitting_step(s, tile_in) for s in STEPS))
    ):
        return wrong
    return (
        f"a scale of {tile_in} inputs; the Triton kernels take powers of two from {LEAST_TILE} on, and multiples of "
        f"{LEAST_STEP}"
    )


def _problem_of_rounding(quant: QuantConfig, inputs: tuple[int, int], arch: str) -> str | None:
    """Codes times codes: fp8 and int8, where no scale changes within a step."""
    a, tile_in = quant.activations, quant.tile[1]
    if a is None:
        return None
    if a.scheme != quant.scheme or quant.zero_points:
        weights = f"{quant.scheme} with zero points" if quant.zero_points else quant.scheme
        return (
            f"{a.scheme} activations with {weights}; the Triton kernels take fp8_e4m3 with fp8_e4m3 and int8 with int8"
        )
    if unknown_option(_NAME, a, ROUNDING) is not None:
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


@constant_while_tracing
def router_problem(config: str, dtype: torch.dtype) -> str | None:
    """Why route_top_k does not compute the ids and weights of a config (`MoEConfig.json`) for logits of dtype; None if
    it does.

    What `weights.router.expert_scale` does comes between the norm and the scale: the kernel does not compute it.
    """
    return _router_problem(config, dtype)


@functools.lru_cache(maxsize=1024)
def _router_problem(config: str, dtype: torch.dtype) -> str | None:
    layer = config_of_json(config)
    wrong, lanes = options.router_problem(_NAME, layer, dtype, DTYPES, ROUTER, GROUPS), math.prod(lanes_of(layer))
    if wrong is not None or lanes <= LANES:
        return wrong
    return f"{lanes} lanes for {layer.num_choices} experts; the Triton kernels take {LANES}"


def lanes_of(config: MoEConfig) -> tuple[int, int]:
    """Lanes of a row: for how many groups, and how many for each."""
    count = 1 if config.router.groups is None else config.router.groups.count
    return _power_of_two(count), max(2, _power_of_two(config.num_choices // count))


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
