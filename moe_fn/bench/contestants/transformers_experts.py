"""Contestants of transformers: experts modules and blocks of its models, with each of its implementations."""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from moe_fn.bench.contestants.entry import Contestant, Layer, Run, activation_name, missing, refuses_weight_on_input
from moe_fn.bench.contestants.routers import is_softmax, renormalizes
from moe_fn.bench.models import matrices
from moe_fn.bench.problem import Problem, TokenInput

BATCHED_MM_BYTES = 4 * 10**9  # batched_mm copies the weights of every (token, expert) pair

# moe_fn's names of gated activations -> transformers' own
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


def _block_like_qwen3(problem: Problem, implementation: str) -> tuple[Any, dict[str, Tensor | None]]:
    config, weights = problem.config, problem.weights
    settings = importlib.import_module("transformers").Qwen3MoeConfig(
        num_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.intermediate_size,
        hidden_act=_ACTIVATIONS[activation_name(config) or ""],
        norm_topk_prob=renormalizes(config.router),
        experts_implementation=implementation,
    )
    modeling = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    gate = None if weights.router is None else weights.router.gate
    with torch.device("meta"):
        block = modeling.Qwen3MoeSparseMoeBlock(settings)
    return block, {"experts.gate_up_proj": weights.gate_up, "experts.down_proj": weights.down, "gate.weight": gate}


def _block_like_gpt_oss(problem: Problem, implementation: str) -> tuple[Any, dict[str, Tensor | None]]:
    config, weights = problem.config, problem.weights
    settings = importlib.import_module("transformers").GptOssConfig(
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        experts_implementation=implementation,
    )
    modeling = importlib.import_module("transformers.models.gpt_oss.modeling_gpt_oss")
    router = weights.router
    with torch.device("meta"):
        block = modeling.GptOssMLP(settings)
    return block, {
        "experts.gate_up_proj": weights.gate_up,
        "experts.gate_up_proj_bias": weights.gate_up_bias,
        "experts.down_proj": weights.down,
        "experts.down_proj_bias": weights.down_bias,
        "router.weight": None if router is None else router.gate,
        "router.bias": None if router is None else router.bias,
    }


def _is_like_gpt_oss(problem: Problem) -> bool:
    config, weights = problem.config, problem.weights
    layouts = (config.gate_up_layout, config.weight_layout)
    return (
        activation_name(config) == "swigluoai"
        and layouts == ("interleaved", "in_out")
        and weights.gate_up_bias is not None
    )


def _is_like_qwen3(problem: Problem) -> bool:
    config, weights = problem.config, problem.weights
    plain = config.gate_up_layout == "packed" and config.weight_layout == "out_in" and weights.gate_up_bias is None
    return plain and activation_name(config) in _ACTIVATIONS


def _build(problem: Problem, implementation: str, compiled: bool) -> Layer:
    make = _block_like_gpt_oss if _is_like_gpt_oss(problem) else _block_like_qwen3
    block, state = make(problem, implementation)
    block.load_state_dict(state, assign=True)
    block.requires_grad_(problem.backward)
    layer = problem.part == "layer"
    module = block if layer else block.experts
    function = torch.compile(module, fullgraph=True) if compiled else module

    def of_block(x: Tensor) -> Tensor:
        result = function(x)
        y: Tensor = result[0] if isinstance(result, tuple) else result  # gpt-oss returns its scores too
        return y[0]

    def bind(token_input: TokenInput) -> Run:
        x, routing = token_input.x, token_input.routing
        if layer:
            return functools.partial(of_block, x.unsqueeze(0))
        # Its routers return weights in the dtype of x.
        return functools.partial(function, x, routing.expert_ids, routing.weights.to(x.dtype))

    return Layer(bind=bind, leaves=tuple(module.parameters()))


def _refuses(problem: Problem, tokens: int, implementation: str) -> str | None:
    if not (_is_like_qwen3(problem) or _is_like_gpt_oss(problem)):
        return "has no supported block with this activation, layout and biases"
    if problem.part == "layer" and not is_softmax(problem.config.router):
        return "the block used here routes by softmax and top-k"
    if implementation == "batched_mm":
        config = problem.config
        of_slot = matrices(config) * config.hidden_size * config.intermediate_size * problem.dtype.itemsize
        if tokens * config.top_k * of_slot > BATCHED_MM_BYTES:
            return f"would copy {tokens * config.top_k * of_slot / 1e9:.1f} GB of weights"
    return refuses_weight_on_input(problem)


def _row(name: str, implementation: str, compiled: bool) -> Contestant:
    return Contestant(
        name=f"transformers {name}",
        installed=functools.partial(missing, "transformers"),
        refuses=functools.partial(_refuses, implementation=implementation),
        build=functools.partial(_build, implementation=implementation, compiled=compiled),
        package="transformers",
    )


TRANSFORMERS: tuple[Contestant, ...] = (
    _row("eager", "eager", compiled=False),
    _row("grouped_mm", "grouped_mm", compiled=False),
    _row("batched_mm", "batched_mm", compiled=False),
    _row("grouped_mm compiled", "grouped_mm", compiled=True),
    _row("batched_mm compiled", "batched_mm", compiled=True),
)
