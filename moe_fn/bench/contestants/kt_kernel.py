"""Contestant kt-kernel (KTransformers): its experts in bfloat16 and in several codes, and its training step.

Its classes are named AMX..., and have AVX-512 code for CPUs without tiles. It takes codes of int4, mxfp4 and fp8 as
they are; int8 it quantizes itself, from bfloat16 weights: the decoded ones, which gives the same codes. For int8 and
int4 it rounds inputs to int8, with a scale for each token or group.

During a call its caller waits actively, besides the threads that it is given.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_fn.bench.contestants.entry import (
    Contestant,
    Layer,
    Run,
    activation_name,
    out_in,
    packed,
    refuses_weight_on_input,
)
from moe_fn.bench.contestants.kt_library import (
    REST_MS,
    addresses,
    extension,
    problem_with_kt,
    silent,
    threads_of,
    variant,
)
from moe_fn.bench.contestants.kt_training import training_layer
from moe_fn.bench.contestants.ours import floats_of
from moe_fn.bench.contestants.routers import refuses_router, routing_of
from moe_fn.bench.contestants.sglang_cpu import int32_of_codes
from moe_fn.bench.problem import Problem, TokenInput
from moe_fn.bench.quants import QUANTS
from moe_fn.quant.codes import codes_of, decode_scale

_TOKENS = 4096  # it makes buffers for the largest number of tokens with the layer
Experts = dict[str, Tensor]  # gate, up and down


@dataclass(frozen=True, kw_only=True)
class Way:
    """How it takes experts.

    classes  names of classes, the best first: a variant does not have all of them
    codes    the stored codes [E, out, in] as it takes them; None: bfloat16 weights, which it quantizes itself
    scale    the scales as it takes them, from those of the problem as floats
    unit     hidden_size and intermediate_size must be multiples of it
    """

    classes: tuple[str, ...]
    unit: int
    codes: Callable[[Tensor], Tensor] | None = None
    scale: Callable[[Tensor], Tensor] | None = None
    settings: tuple[tuple[str, int | bool], ...] = ()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _bfloat16(scale: Tensor) -> Tensor:
    return scale.to(torch.bfloat16)


def _of_channels(scale: Tensor) -> Tensor:
    return scale.squeeze(2)


def _by_group(scale: Tensor) -> Tensor:
    return scale.transpose(1, 2)


_INT4, _FP8 = (("bits", 4), ("zero_point", False)), (("bits", 8), ("zero_point", False))
_FLOATS = Way(classes=("AMXBF16_MOE", "AVX2BF16_MOE"), unit=32)
_INT4_OF_32 = Way(
    classes=("AMXInt4_KGroup_MOE", "AVX2RawInt4_MOE"),
    unit=128,
    codes=_as_it_is,
    scale=_bfloat16,
    settings=(*_INT4, ("group_size", 32)),
)
_WAYS = {
    "int8-int8": Way(classes=("AMXInt8_MOE",), unit=128),
    "int4-g32": _INT4_OF_32,
    "int4-g32-int8": _INT4_OF_32,
    "int4-g128": Way(
        classes=("AVXVNNI256GPTQInt4Packed_MOE", "AVXVNNI256GPTQInt4_MOE"),
        unit=128,
        codes=int32_of_codes,
        scale=_by_group,
        settings=(*_INT4, ("group_size", 128)),
    ),
    "mxfp4": Way(
        classes=("AMXFP4_KGroup_MOE", "AVX2MXFP4_MOE"),
        unit=128,
        codes=_as_it_is,
        scale=_bfloat16,
        settings=(*_INT4, ("group_size", 32)),
    ),
    "fp8": Way(
        classes=("AMXFP8PerChannel_MOE",),
        unit=128,
        codes=_as_it_is,
        scale=_of_channels,
        settings=(*_FP8, ("per_channel", True)),
    ),
    "fp8-block": Way(
        classes=("AMXFP8_MOE", "AVX2FP8_MOE"),
        unit=128,
        codes=_as_it_is,
        scale=_as_it_is,
        settings=(*_FP8, ("group_size", 128)),
    ),
}


def _way(problem: Problem) -> Way | None:
    quant = problem.config.quant
    return _FLOATS if quant is None else next((way for name, way in _WAYS.items() if QUANTS[name] == quant), None)


def _class_of(way: Way) -> Any:
    found = (getattr(extension().moe, name, None) for name in way.classes)
    made = next((one for one in found if one is not None), None)
    if made is None:
        raise ImportError(f"kt-kernel's variant {variant()} has none of {', '.join(way.classes)}")
    return made


def gate_up_and_down(problem: Problem, gate_up: Tensor, down: Tensor) -> Experts:
    """gate, up and down from gate_up and down, [E, out, ...]: parts of the same tensors where the layout allows."""
    halves = packed(gate_up) if problem.config.gate_up_layout == "interleaved" else gate_up
    gate, up = halves.chunk(2, dim=1)
    return {"gate": gate, "up": up, "down": down}


def floats_of_kt(problem: Problem) -> Experts:
    """gate, up and down [E, out, in] in bfloat16, decoded if they are codes."""
    config, weights = (problem.config, problem.weights) if problem.config.quant is None else floats_of(problem)
    experts = gate_up_and_down(problem, out_in(config, weights.gate_up), out_in(config, weights.down))
    return {name: tensor.detach().contiguous() for name, tensor in experts.items()}


def _set_codes(problem: Problem, way: Way, config: Any) -> list[list[Tensor]]:
    """Sets the addresses of codes and scales; returns the tensors, which must live until they are loaded."""
    quant, kept = problem.config.quant, []
    stored = codes_of(problem.weights, "gate_up"), codes_of(problem.weights, "down")
    codes = gate_up_and_down(problem, stored[0].codes, stored[1].codes)
    scales = gate_up_and_down(problem, *(decode_scale(quant, one.scale, torch.float32) for one in stored))  # type: ignore[arg-type]
    for name in codes:
        for what, tensor, change in (("projs", codes[name], way.codes), ("scales", scales[name], way.scale)):
            kept.append([one.contiguous() for one in (change or _as_it_is)(tensor.contiguous())])
            setattr(config, f"{name}_{what}", addresses(kept[-1]))
    return kept


def _build(problem: Problem) -> Layer:
    if problem.backward:
        return training_layer(problem, tuple(floats_of_kt(problem).values()), _TOKENS)
    way, kt, sizes = _way(problem) or _FLOATS, extension(), problem.config
    config = kt.moe.MOEConfig(sizes.num_experts, sizes.top_k, sizes.hidden_size, sizes.intermediate_size, 0)
    pool, order = threads_of(problem.threads), torch.arange(sizes.num_experts)
    config.max_len, config.pool = _TOKENS, pool.backend_
    for name, value in way.settings:
        setattr(config.quant_config, name, value)
    if way.codes is None:
        kept: Any = floats_of_kt(problem)
        config.gate_proj, config.up_proj, config.down_proj = (tensor.data_ptr() for tensor in kept.values())
    else:
        kept = _set_codes(problem, way, config)
    with silent():
        experts = _class_of(way)(config)
        pool.submit(experts.load_weights_task(order.data_ptr()))
        pool.sync()
    del kept

    def run(token_input: TokenInput, number: Tensor) -> Tensor:
        routing, y = routing_of(problem, token_input), torch.empty_like(token_input.x)
        routed = number.data_ptr(), sizes.top_k, routing.expert_ids.data_ptr(), routing.weights.data_ptr()
        experts.forward(*routed, token_input.x.data_ptr(), y.data_ptr(), False)
        return y

    def bind(token_input: TokenInput) -> Run:
        return functools.partial(run, token_input, torch.tensor([len(token_input.x)], dtype=torch.int32))

    return Layer(bind=bind, rest_ms=REST_MS)


def _refuses(problem: Problem, tokens: int) -> str | None:
    config, way = problem.config, _way(problem)
    if problem.device.type != "cpu":
        return f"runs on cpu, not {problem.device.type}"
    if problem.dtype != torch.bfloat16:
        return f"is for bfloat16, not {problem.dtype}"
    if way is None:
        return f"takes {', '.join(_WAYS)} here"
    if activation_name(config) != "silu" or problem.weights.gate_up_bias is not None:
        return "supports gated silu without biases"
    if config.hidden_size % way.unit or config.intermediate_size % way.unit:
        return f"needs sizes divisible by {way.unit} here"
    if tokens > _TOKENS:
        return f"is set up for at most {_TOKENS} tokens here"
    return refuses_weight_on_input(problem) or refuses_router(problem)


KT_KERNEL = Contestant(
    name="kt-kernel",
    installed=problem_with_kt,
    refuses=_refuses,
    build=_build,
    takes="both",
    copies=4,  # in its layout, and copies while it loads them; for the backward pass twice
    copies_of_floats=2,
    devices=("cpu",),
    package="kt-kernel",
    level=variant,
)
