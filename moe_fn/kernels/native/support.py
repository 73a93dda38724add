"""Which layers the C++ kernels compute: devices, dtypes and the options that their sources know."""

import functools

import torch

from moe_fn.config.moe import config_of_json
from moe_fn.config.quant import quant_of_json
from moe_fn.kernels import options
from moe_fn.kernels.native.library import active
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
from moe_fn.torch_compat import constant_while_tracing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAME = "the native kernels"

EXPERTS: Known = {**FUSED_LAYER, "lora": ANY}
ACTIVATION: Known = {**FUSED_ACTIVATION}  # activation.h
QUANT: Known = {  # quant_arguments.h
    "scheme": ("fp8_e4m3", "int8", "int4", "mxfp4", "mxfp8", "nvfp4"),
    "granularity": ("tensor", "channel", "group", "block"),
    "group_size": ANY,
    "block_shape": ANY,
    "zero_points": (False, True),
    "activations": ANY,  # ROUNDING
}
ROUNDING: Known = {"scheme": ("int8",), "granularity": ("token",)}
ROUTER: Known = {**FUSED_ROUTER}  # router.cpp
GROUPS: Known = {**FUSED_GROUPS}


def problem(device: str, dtype: torch.dtype) -> str | None:
    """Why the kernels do not run for this device and dtype; None if they do. Builds them on first use."""
    if device != "cpu":
        return f"the native kernels run on the CPU, not on {device}"
    if dtype not in DTYPES:
        return f"the native kernels compute in float32, bfloat16 and float16, not in {dtype}"
    return active().problem


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
    """Why the kernels do not compute quantized experts (`QuantConfig.json`); None if they do."""
    return _quant_problem(quant, max(hidden, intermediate))


@functools.lru_cache(maxsize=1024)
def _quant_problem(text: str, inputs: int) -> str | None:
    quant = quant_of_json(text)
    tile, together, a = quant.tile[1], 4 * quant.per_byte, quant.activations
    wrong = unknown_option(_NAME, quant, QUANT)
    if wrong is not None:
        return f"quant: {wrong}"
    if tile is not None and tile % together and tile < inputs:  # a decoder takes 32 bits of codes at once
        return f"quant: a scale of {tile} inputs; the native kernels take multiples of {together}"
    if a is not None and unknown_option(_NAME, a, ROUNDING) is not None:
        scale = "static" if a.static else "computed"
        return (
            f"quant: {a.scheme} activations, {scale} scale of a {a.granularity}; "
            "the native kernels take int8, computed for a token"
        )
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
    return options.router_problem(_NAME, config_of_json(config), dtype, DTYPES, ROUTER, GROUPS)
