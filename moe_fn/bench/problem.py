"""Weights and inputs of a benchmark: one layer's random weights, and inputs that change from call to call."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import moe_fn
from moe_fn.bench.models import Model, matrices
from moe_fn.bench.quants import expert_bytes, quantized_config
from moe_fn.config import MoEConfig, QuantConfig, RouterConfig
from moe_fn.records import WEIGHT_PATHS, MoEWeights, RouterWeights, Routing, leaves_of_weights, weights_of_leaves
from moe_fn.stages.route import router_logits
from moe_fn.weights.quantize import quantize_weights
from moe_fn.weights.spec import EXPERT_PATHS

Part = Literal["experts", "layer"]
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
INPUTS = 8  # calls cycle through as many inputs: with one, the experts of a few tokens would stay in the cache


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One layer to time.

    part    "experts": ids and weights are given; "layer": the router's gate is timed too
    dtype   of x, and of the weights unless config.quant is given
    """

    config: MoEConfig
    weights: MoEWeights
    dtype: torch.dtype
    device: torch.device
    threads: int
    part: Part
    backward: bool


@dataclass(frozen=True, kw_only=True)
class TokenInput:
    """x [T, H], the gate's logits [T, E] and their routing; grad [T, H] is dloss/dy if gradients are timed."""

    x: Tensor
    logits: Tensor
    routing: Routing
    grad: Tensor | None


def problem_of_model(
    model: Model,
    dtype: torch.dtype,
    device: torch.device,
    threads: int,
    part: Part,
    backward: bool,
    quant: QuantConfig | None = None,
) -> Problem:
    """The model's layer with random weights of variance 1 / fan_in, the same in every run, and quantized by `quant`."""
    config, weights = quantized_config(model.config, quant), _random_weights(model, quant, dtype, device)
    for leaf in leaves_of_weights(weights):
        if leaf is not None and backward:
            leaf.requires_grad_()
    return Problem(
        config=config, weights=weights, dtype=dtype, device=device, threads=threads, part=part, backward=backward
    )


def weights_of_experts(weights: MoEWeights, which: slice | Tensor) -> MoEWeights:
    """The weights of these experts only, without router and other weights."""
    leaves = zip(WEIGHT_PATHS, leaves_of_weights(weights), strict=True)
    return weights_of_leaves(
        [None if leaf is None or path not in EXPERT_PATHS else leaf[which] for path, leaf in leaves]
    )


def config_of_one(config: MoEConfig) -> MoEConfig:
    """The config of a layer with a single one of the experts."""
    return dataclasses.replace(config, num_experts=1, top_k=1, router=RouterConfig(), shared=None, zero_experts=None)


def token_inputs(problem: Problem, tokens: int) -> tuple[TokenInput, ...]:
    """INPUTS different inputs with this number of tokens."""
    generator = torch.Generator(problem.device).manual_seed(tokens)

    def normal() -> Tensor:
        return (
            torch.empty(tokens, problem.config.hidden_size, device=problem.device)
            .normal_(generator=generator)
            .to(problem.dtype)
        )

    inputs = []
    with torch.no_grad():
        for _ in range(INPUTS):
            x, grad = normal(), normal() if problem.backward else None
            logits = router_logits(problem.config, problem.weights, x)
            routing = moe_fn.route(problem.config, problem.weights, logits)
            inputs.append(TokenInput(x=x.requires_grad_(problem.backward), logits=logits, routing=routing, grad=grad))
    return tuple(inputs)


def distinct_experts(token_input: TokenInput) -> int:
    """The number of distinct experts in the routing, whose weights must be read."""
    return len(token_input.routing.expert_ids.unique())


def weight_bytes(config: MoEConfig, dtype: torch.dtype) -> int:
    """Bytes of all the experts' matrices."""
    return config.num_experts * expert_bytes(config, dtype)


def step_bytes(config: MoEConfig, tokens: int, dtype: torch.dtype, backward: bool) -> int:
    """Approximate bytes of a step besides the weights: inputs, and rows around each product and activation."""
    inputs = INPUTS * tokens * config.hidden_size * (2 if backward else 1)
    rows = tokens * config.top_k * (2 * config.hidden_size + 3 * config.intermediate_size)
    return (inputs + rows * (3 if backward else 1)) * dtype.itemsize


def _random_weights(model: Model, quant: QuantConfig | None, dtype: torch.dtype, device: torch.device) -> MoEWeights:
    config, generator = model.config, torch.Generator(device).manual_seed(0)
    experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    gate_up = (matrices(config) - 1) * inner
    noise = torch.empty(gate_up * hidden + 977 * experts, dtype=dtype, device=device).normal_(generator=generator)

    def small(*shape: int) -> Tensor:
        return torch.empty(shape, device=device).normal_(0, 0.1, generator=generator).to(dtype)

    corrects = config.router.correction_bias != "none"
    router = RouterWeights(
        gate=torch.empty(experts, hidden, device=device).normal_(0, hidden**-0.5, generator=generator).to(dtype),
        bias=small(experts) if model.biases else None,
        correction_bias=torch.zeros(experts, device=device) if corrects else None,
    )
    matrix_shapes = (gate_up, hidden), (hidden, inner)
    made = _floats(config, noise, *matrix_shapes) if quant is None else _codes(config, quant, noise, *matrix_shapes)
    return dataclasses.replace(
        made,
        gate_up_bias=small(experts, gate_up) if model.biases else None,
        down_bias=small(experts, hidden) if model.biases else None,
        router=router,
    )


def _floats(config: MoEConfig, noise: Tensor, gate_up: tuple[int, int], down: tuple[int, int]) -> MoEWeights:
    def normal(shape: tuple[int, int]) -> Tensor:
        matrix = noise.new_empty((config.num_experts, *shape))
        for expert in range(config.num_experts):
            torch.mul(_window(noise, expert, shape), shape[1] ** -0.5, out=matrix[expert])
        return matrix.transpose(1, 2).contiguous() if config.weight_layout == "in_out" else matrix

    return MoEWeights(gate_up=normal(gate_up), down=normal(down))


def _codes(
    config: MoEConfig, quant: QuantConfig, noise: Tensor, gate_up: tuple[int, int], down: tuple[int, int]
) -> MoEWeights:
    """The codes of the weights of `_floats`, made one expert at a time: all in float32 may not fit in memory."""
    plain = dataclasses.replace(config_of_one(config), weight_layout="out_in", quant=None)
    made = []
    for expert in range(config.num_experts):
        floats = [_window(noise, expert, shape).unsqueeze(0) * shape[1] ** -0.5 for shape in (gate_up, down)]
        made.append(leaves_of_weights(quantize_weights(plain, MoEWeights(gate_up=floats[0], down=floats[1]), quant)[1]))
    return weights_of_leaves([None if parts[0] is None else torch.cat(parts) for parts in zip(*made, strict=True)])


def _window(noise: Tensor, expert: int, shape: tuple[int, int]) -> Tensor:
    """An expert's values: a shifted window of the same noise, since drawing a gigabyte takes longer than timing it."""
    return noise[977 * expert : 977 * expert + shape[0] * shape[1]].view(shape)
