"""Contestant Liger-Kernel, fused MoE: SonicMoE's algorithm in Triton, the implementation most similar to moe_fn's.

Its releases read the number of tiles on the host (`.item()`), so it cannot be captured and is timed call by call.
"""

import functools
import importlib

import torch
from torch import Tensor

from moe_fn.bench.contestants.entry import Contestant, Layer, missing, out_in, rows_as_wanted
from moe_fn.bench.contestants.on_gpu import GPU, layer_of_experts, refuses_of_library
from moe_fn.bench.problem import Problem


def _build(problem: Problem) -> Layer:
    function = importlib.import_module("liger_kernel.ops").LigerFusedMoEFunction
    config, weights = problem.config, problem.weights
    gate_up, down = rows_as_wanted(problem, out_in(config, weights.gate_up)), out_in(config, weights.down)

    def experts(x: Tensor, ids: Tensor, routing_weights: Tensor) -> Tensor:
        y: Tensor = function.apply(x, gate_up, down, ids, routing_weights.to(x.dtype))
        return y

    return layer_of_experts(problem, experts, torch.int32, leaves=(gate_up, down))


def _refuses(problem: Problem, tokens: int) -> str | None:
    return refuses_of_library(problem, ("silu",), biases=False, gradients=True)


LIGER = Contestant(
    name="liger",
    installed=functools.partial(missing, "liger_kernel"),
    refuses=_refuses,
    build=_build,
    copies=1,
    devices=GPU,
)
