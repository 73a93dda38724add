"""Compares a contestant's output and gradients with the reference layer: wrong ones are not timed."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

import moe_fn.reference
from moe_fn.bench.problem import Problem, TokenInput, weights_of_experts
from moe_fn.config import MoEConfig, RouterConfig
from moe_fn.records import MoEWeights, Routing, leaves_of_weights, weights_of_leaves

TOKENS = 4  # number of checked tokens; the reference is slow
TOKENS_OF_CODES = 2  # the same with quantized experts, where the reference is slower
# Limits of the relative error of the median token. The median, since a tie of rounded logits may go either way.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-5}
# Limits where inputs are rounded, by their scheme. Rounding alone changes y by 1 to 2 % (int8, a scale per token) and
# 4 % (e4m3), and contestants use scales of other granularities than the reference, or do not round.
TOLERANCE_OF_ROUNDED = {"int8": 4e-2, "fp8_e4m3": 8e-2}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The reference's results for the first TOKENS tokens: y and, if gradients are timed, x_grad; both [<= TOKENS, H]
    float64.

    worst: whether the worst token must be within the tolerance, instead of the median one.
    """

    y: Tensor
    x_grad: Tensor | None
    worst: bool = False


def expected_of(problem: Problem, token_input: TokenInput) -> Expected:
    """The reference's results, one token at a time with only its experts: a layer in float64 may not fit in memory."""
    outputs: list[Tensor] = []
    grads: list[Tensor] = []
    for token in range(min(TOKENS if problem.config.quant is None else TOKENS_OF_CODES, len(token_input.x))):
        x = token_input.x[token : token + 1].detach().to("cpu", torch.float64).requires_grad_(problem.backward)
        y = _token_output(problem, token_input, x, token)
        outputs.append(y.detach())
        if token_input.grad is not None:
            grads += torch.autograd.grad(y, x, token_input.grad[token : token + 1].to(y))
    worst = problem.config.quant is not None and problem.part == "experts"  # no logits, no ties
    return Expected(y=torch.cat(outputs), x_grad=torch.cat(grads) if grads else None, worst=worst)


def relative_error(actual: Tensor, expected: Tensor, worst: bool = False) -> float:
    """|actual - expected| / |expected| of the median (or worst) token of the first len(expected) tokens."""
    difference = actual[: len(expected)].detach().to(expected) - expected
    errors = difference.norm(dim=-1) / expected.norm(dim=-1)
    return float(errors.max() if worst else errors.median())


def tolerance_of(problem: Problem) -> float:
    """The largest relative error of a right result."""
    activations = None if problem.config.quant is None else problem.config.quant.activations
    tolerance = TOLERANCE[problem.dtype]
    return tolerance if activations is None else max(tolerance, TOLERANCE_OF_ROUNDED[activations.scheme])


def _token_output(problem: Problem, token_input: TokenInput, x: Tensor, token: int) -> Tensor:
    routing = _routing_of_layer(problem, x) if problem.part == "layer" else _on_cpu(token_input.routing, token)
    config, ids = problem.config, routing.expert_ids[0]
    slots = torch.arange(config.top_k).unsqueeze(0)
    routing = Routing(expert_ids=slots, weights=routing.weights)
    return moe_fn.reference.moe_forward_routed(
        _config_of_slots(config), _weights_of_slots(problem.weights, ids), x, routing
    )


def _routing_of_layer(problem: Problem, x: Tensor) -> Routing:
    config, router = problem.config, problem.weights.router
    if router is None or router.gate is None:
        raise ValueError("problem.weights.router.gate is None; expected the gate of the layer")
    bias = 0.0 if router.bias is None else router.bias.detach().to("cpu", torch.float64)
    logits = x @ router.gate.detach().to("cpu", torch.float64).T + bias
    if config.router.gate_dtype == "input":
        logits = logits.to(problem.dtype)  # ties after rounding are ties here too
    correction = None if router.correction_bias is None else router.correction_bias.detach().cpu()
    alone = dataclasses.replace(router, gate=None, bias=None, correction_bias=correction)
    empty = torch.empty(0)  # the reference's router does not use the experts
    return moe_fn.reference.route(config, MoEWeights(gate_up=empty, down=empty, router=alone), logits)


def _on_cpu(routing: Routing, token: int) -> Routing:
    one = slice(token, token + 1)
    return Routing(expert_ids=routing.expert_ids[one].cpu(), weights=routing.weights[one].cpu())


def _config_of_slots(config: MoEConfig) -> MoEConfig:
    router = RouterConfig(weight_on=config.router.weight_on)
    return dataclasses.replace(config, num_experts=config.top_k, router=router)


def _weights_of_slots(weights: MoEWeights, ids: Tensor) -> MoEWeights:
    chosen = weights_of_experts(weights, ids.to(weights.gate_up.device))
    return weights_of_leaves([None if leaf is None else leaf.detach().cpu() for leaf in leaves_of_weights(chosen)])
