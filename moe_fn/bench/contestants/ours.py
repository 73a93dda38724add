"""moe_fn itself, compiled and eager, with weights as they are and laid out for its kernels."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import moe_fn
from moe_fn.bench.contestants.entry import Contestant, Layer, Run, always_installed, trained_leaves
from moe_fn.bench.problem import Problem, TokenInput


def _build(problem: Problem, compiled: bool, prepared: bool) -> Layer:
    config, weights = problem.config, problem.weights
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


def _refuses_nothing(problem: Problem, tokens: int) -> str | None:
    return None


def _refuses_what_is_the_same(problem: Problem, tokens: int) -> str | None:
    return "is moe_fn: gradients go to the weights as they are" if problem.backward else None


OURS: tuple[Contestant, ...] = (
    Contestant(
        name="moe_fn",
        installed=always_installed,
        refuses=_refuses_nothing,
        build=functools.partial(_build, compiled=True, prepared=True),
        copies=1,
        ours=True,
    ),
    Contestant(
        name="moe_fn plain",
        installed=always_installed,
        refuses=_refuses_what_is_the_same,
        build=functools.partial(_build, compiled=True, prepared=False),
        ours=True,
    ),
    Contestant(
        name="moe_fn eager",
        installed=always_installed,
        refuses=_refuses_nothing,
        build=functools.partial(_build, compiled=False, prepared=True),
        copies=1,
        ours=True,
    ),
)
