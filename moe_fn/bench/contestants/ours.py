"""Contestants of moe_fn: compiled and eager, with plain and prepared weights, batch-invariant, and the torch back-end.

With quantized experts: with the codes, and with the decoded weights.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

import moe_fn
from moe_fn.bench.contestants.entry import UNQUANTIZED, Contestant, Layer, Run, always_installed, trained_leaves
from moe_fn.bench.problem import Problem, TokenInput, config_of_one, weights_of_experts
from moe_fn.config import MoEConfig
from moe_fn.kernels.native import library
from moe_fn.records import MoEWeights
from moe_fn.weights.quantize import dequantize_weights

Changes = tuple[tuple[str, Any], ...]  # options of the config and their values; contestants are pickled


def _build(problem: Problem, compiled: bool, prepared: bool, changes: Changes, floats: bool = False) -> Layer:
    config, weights = floats_of(problem) if floats else (problem.config, problem.weights)
    config = dataclasses.replace(config, **dict(changes))
    if prepared and not problem.backward:
        weights = moe_fn.prepare_weights(config, weights)
    layer = problem.part == "layer"
    function: Callable[..., Tensor] = moe_fn.moe_forward if layer else moe_fn.moe_forward_routed
    if compiled:
        function = torch.compile(function, fullgraph=True)

    def bind(token_input: TokenInput) -> Run:
        arguments = (token_input.x,) if layer else (token_input.x, token_input.routing)
        return functools.partial(function, config, weights, *arguments)

    return Layer(bind=bind, leaves=trained_leaves(weights, with_router=layer))


def floats_of(problem: Problem) -> tuple[MoEConfig, MoEWeights]:
    """The config and weights with decoded experts, decoded one at a time, as `problem` encodes them."""
    config, weights = problem.config, problem.weights
    hidden, inner, outputs = config.hidden_size, config.intermediate_size, weights.gate_up.shape[1]
    gate_up = torch.empty((config.num_experts, outputs, hidden), dtype=problem.dtype, device=problem.device)
    down = torch.empty((config.num_experts, hidden, inner), dtype=problem.dtype, device=problem.device)
    for expert in range(config.num_experts):
        one = slice(expert, expert + 1)
        found = dequantize_weights(config_of_one(config), weights_of_experts(weights, one), problem.dtype)[1]
        gate_up[one], down[one] = found.gate_up, found.down
    return dataclasses.replace(config, quant=None), dataclasses.replace(weights, gate_up=gate_up, down=down, quant=None)


def _refuses(problem: Problem, tokens: int, plain: bool) -> str | None:
    return None if not plain or not problem.backward else "is moe_fn: gradients are of plain weights"


def _level() -> str:
    found = library.active()
    return found.level if found.problem is None else "no kernels, torch's products"


def _row(
    name: str,
    compiled: bool,
    devices: tuple[str, ...],
    prepared: bool = True,
    changes: Changes = (),
    takes: Literal["codes", "both"] = "both",
) -> Contestant:
    return Contestant(
        name=name,
        installed=always_installed,
        refuses=functools.partial(_refuses, plain=not prepared),
        build=functools.partial(_build, compiled=compiled, prepared=prepared, changes=changes, floats=takes == "codes"),
        takes=takes,
        copies=1 if prepared and takes == "both" else 0,
        copies_of_floats=2 if takes == "codes" else 0,
        ours=True,
        devices=devices,
        level=_level,
    )


OURS: tuple[Contestant, ...] = (
    _row("moe_fn", compiled=True, devices=("cpu", "cuda")),
    # kernels for GPUs read plain weights
    _row("moe_fn plain", compiled=True, devices=("cpu",), prepared=False),
    _row("moe_fn eager", compiled=False, devices=("cpu", "cuda")),
    _row("moe_fn invariant", compiled=True, devices=("cpu", "cuda"), changes=(("batch_invariant", True),)),
    _row(
        "moe_fn plain invariant", compiled=True, devices=("cpu",), prepared=False, changes=(("batch_invariant", True),)
    ),
    _row("moe_fn torch", compiled=True, devices=("cuda",), changes=(("backend", "torch"),)),
    _row(UNQUANTIZED, compiled=True, devices=("cpu", "cuda"), takes="codes"),
)
