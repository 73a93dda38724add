"""Training step of the contestant kt-kernel: full fine-tuning of experts in bfloat16 (full_weight_grad).

It writes the gradients of the weights into buffers that it is given once, so that no step takes fresh memory for them;
those of experts without tokens become zero.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from moe_fn.bench.contestants.entry import Layer, Run
from moe_fn.bench.contestants.kt_library import REST_MS, extension, silent, threads_of
from moe_fn.bench.contestants.routers import routing_of
from moe_fn.bench.problem import Problem, TokenInput
from moe_fn.records import RouterWeights

_OF_ADAPTERS = (0,) * 6  # addresses of their gradients: there are none


class _Step(torch.autograd.Function):
    """Experts, differentiated by x, by the routing's weights and by gate, up and down, whose gradients are `grads`."""

    @staticmethod
    def forward(ctx: Any, layer: Any, grads: tuple[Tensor, ...], ids: Tensor, *inputs: Tensor) -> Tensor:
        x, weights = inputs[:2]
        y, number = torch.empty_like(x), torch.tensor([len(x)], dtype=torch.int32)
        addresses = (ids.data_ptr(), weights.data_ptr(), x.data_ptr(), y.data_ptr())
        layer.forward_sft(number.data_ptr(), ids.shape[1], *addresses, True)
        ctx.layer, ctx.grads, ctx.kept = layer, grads, (ids, x, weights)
        return y

    @staticmethod
    def backward(ctx: Any, *y_grads: Tensor) -> tuple[Tensor | None, ...]:
        y_grad, (_, x, weights) = y_grads[0].contiguous(), ctx.kept
        x_grad, weights_grad = torch.empty_like(x), torch.empty_like(weights)
        addresses = (tensor.data_ptr() for tensor in (weights_grad, *ctx.grads))
        ctx.layer.backward(y_grad.data_ptr(), x_grad.data_ptr(), *_OF_ADAPTERS, *addresses)
        return None, None, None, x_grad, weights_grad, *ctx.grads


def training_layer(problem: Problem, experts: tuple[Tensor, ...], tokens: int) -> Layer:
    """The layer with gradients. experts: gate, up and down [E, out, in]; tokens: at most so many."""
    kt, sizes, pool = extension(), problem.config, threads_of(problem.threads)
    order = torch.arange(sizes.num_experts)
    config = kt.moe.MOESFTConfig(sizes.num_experts, sizes.top_k, sizes.hidden_size, sizes.intermediate_size)
    config.max_len, config.pool, config.max_cache_depth = tokens, pool.backend_, 1
    config.lora_rank, config.full_weight_grad, config.authoritative_optimizer_grads = 0, True, True
    config.physical_to_logical_map = order.data_ptr()
    config.gate_proj, config.up_proj, config.down_proj = (tensor.data_ptr() for tensor in experts)
    with silent():
        layer = kt.moe.AMXBF16_SFT_MOE(config)
        pool.submit(layer.load_weights_task())
        pool.sync()
    leaves = tuple(tensor.requires_grad_() for tensor in experts)
    grads, router = tuple(torch.empty_like(tensor) for tensor in experts), problem.weights.router or RouterWeights()

    def run(token_input: TokenInput) -> Tensor:
        routing = routing_of(problem, token_input)
        y: Tensor = _Step.apply(layer, grads, routing.expert_ids, token_input.x, routing.weights, *leaves)  # type: ignore[no-untyped-call]
        return y

    def bind(token_input: TokenInput) -> Run:
        order.data_ptr()  # which the layer reads in each step
        return functools.partial(run, token_input)

    of_router = (router.gate, router.bias) if problem.part == "layer" else ()
    return Layer(bind=bind, leaves=(*leaves, *(one for one in of_router if one is not None)), rest_ms=REST_MS)
