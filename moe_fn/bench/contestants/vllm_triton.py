"""Contestant vLLM on GPUs: its Triton kernel fused_experts, with its tuned tiles for this GPU and shape, if any."""

import functools
import importlib

import torch
from torch import Tensor

from moe_fn.bench.contestants.entry import Contestant, Layer, activation_name, missing, out_in, rows_as_wanted
from moe_fn.bench.contestants.on_gpu import GPU, layer_of_experts, refuses_of_library
from moe_fn.bench.problem import Problem
from moe_fn.config import as_activation

_FOLDER = "vllm.model_executor.layers.fused_moe"
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2_no_mul", "swigluoai")


def _build(problem: Problem) -> Layer:
    fused_experts = importlib.import_module(_FOLDER).fused_experts
    activation = importlib.import_module(f"{_FOLDER}.activation").MoEActivation(activation_name(problem.config))
    config, weights = problem.config, problem.weights
    gated = as_activation(config.activation).gated
    gate_up, down = out_in(config, weights.gate_up), out_in(config, weights.down)
    gate_up = rows_as_wanted(problem, gate_up) if gated else gate_up
    quant_config = None
    if weights.gate_up_bias is not None:
        bias = rows_as_wanted(problem, weights.gate_up_bias) if gated else weights.gate_up_bias
        quant_config = importlib.import_module(f"{_FOLDER}.config").biased_moe_quant_config(bias, weights.down_bias)

    def experts(x: Tensor, ids: Tensor, routing_weights: Tensor) -> Tensor:
        y: Tensor = fused_experts(
            x, gate_up, down, routing_weights, ids, activation=activation, quant_config=quant_config
        )
        return y

    return layer_of_experts(problem, experts, torch.int32)


def _refuses(problem: Problem, tokens: int) -> str | None:
    return refuses_of_library(problem, _ACTIVATIONS, biases=True, gradients=False)


VLLM = Contestant(
    name="vllm", installed=functools.partial(missing, "vllm"), refuses=_refuses, build=_build, copies=1, devices=GPU
)
