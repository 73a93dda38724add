"""Contestant ScatterMoE: its two products over sorted slots, as in its GLUMLP (github.com/shawntan/scattermoe)."""

import functools
import importlib

import torch
from torch import Tensor

from moe_fn.bench.contestants.entry import Contestant, Layer, missing
from moe_fn.bench.contestants.on_gpu import GPU, layer_of_experts, refuses_of_library
from moe_fn.bench.problem import Problem


def _build(problem: Problem) -> Layer:
    package = importlib.import_module("scattermoe")
    config, weights = problem.config, problem.weights
    as_stored = config.weight_layout == "in_out"

    def experts(x: Tensor, ids: Tensor, routing_weights: Tensor) -> Tensor:
        order = package.flatten_sort_count(ids, config.num_experts)
        gate_up, down = (w if as_stored else w.permute(0, 2, 1) for w in (weights.gate_up, weights.down))
        gate, up = package.parallel_linear(x, gate_up, config.top_k, *order, grouped_out=True).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        y: Tensor = package.parallel_linear(hidden, down, 1, *order, gates=routing_weights.to(x.dtype), grouped_in=True)
        return y

    return layer_of_experts(problem, experts, torch.int64, leaves=(weights.gate_up, weights.down))


def _refuses(problem: Problem, tokens: int) -> str | None:
    if problem.config.gate_up_layout != "packed":
        return "supports packed gate_up here (gates, then ups)"
    return refuses_of_library(problem, ("silu",), biases=False, gradients=True)


SCATTERMOE = Contestant(
    name="scattermoe", installed=functools.partial(missing, "scattermoe"), refuses=_refuses, build=_build, devices=GPU
)
