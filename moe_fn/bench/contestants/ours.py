"""moe_fn itself, compiled and eager, with weights as they are and laid out for its kernels, and its plain torch back-end."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

import moe_fn
from moe_fn.bench.contestants.entry import Contestant, Layer, Run, always_installed, trained_leaves
from moe_fn.bench.problem import Problem, TokenInput


def _build(problem: Problem, compiled: bool, prepared: bool, only_torch: bool) -> Layer:
    config, weights = problem.config, problem.weights
    if only_torch:
        config = dataclasses.replace(config, backend="torch")
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


def _refuses(problem: Problem, tokens: int, plain: bool) -> str | None:
    return None if not plain or not problem.backward else "is moe_fn: gradients go to the weights as they are"


def _row(name: str, compiled: bool, devices: tuple[str, ...], prepared: bool = True, only_torch: bool = False) -> Contestant:
    return Contestant(
        name=name,
        installed=always_installed,
        refuses=functools.partial(_refuses, plain=not prepared),
        build=functools.partial(_build, compiled=compiled, prepared=prepared, only_torch=only_torch),
        copies=1 if prepared else 0,
        ours=True,
        devices=devices,
    )


OURS: tuple[Contestant, ...] = (
    _row("moe_fn", compiled=True, devices=("cpu", "cuda")),
    _row("moe_fn plain", compiled=True, devices=("cpu",), prepared=False),  # the kernels of a GPU read weights as they are
    _row("moe_fn eager", compiled=False, devices=("cpu", "cuda")),
    _row("moe_fn torch", compiled=True, devices=("cuda",), only_torch=True),
)
