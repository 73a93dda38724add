"""Dispatch, experts, combine: one after the other, or as the one op of a back-end that has a kernel for all three.

Why an op: the loop over experts is ragged, and what is fused here (copies of tokens, the activation, the weighted sum)
stays in the cache instead of going through memory as rows x hidden buffers, which cost as much as the products from 256
tokens on. What would remove it: an Inductor that generates grouped products with a gather in front and a weighted
scatter behind.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_fn.backends import backend_of
from moe_fn.config import MoEConfig, as_activation
from moe_fn.fused.schema import packed, unpacked, with_floats
from moe_fn.kernels.arguments import ARGUMENTS, DIFFERENTIABLE, arguments_of, flat
from moe_fn.kernels.native import call as native
from moe_fn.kernels.native import support as on_cpu
from moe_fn.kernels.torch import support as in_torch
from moe_fn.kernels.triton import call as gpu
from moe_fn.kernels.triton import support as on_gpu
from moe_fn.numerics import accumulation_dtype
from moe_fn.ops.arithmetic import ARITHMETIC
from moe_fn.ops.define import Kernel, vjp
from moe_fn.ops.grouped_matmul import GROUPED, spread_over_rows
from moe_fn.ops.routed import define_routed_experts, define_routed_experts_backward
from moe_fn.ops.rows import gather_rows, has_expert
from moe_fn.records import MoEWeights, Routing
from moe_fn.stages._activation import activate
from moe_fn.stages.combine import _combine
from moe_fn.stages.dispatch import _dispatch, weighted
from moe_fn.stages.experts import _experts
from moe_fn.torch_compat import check_draft_export, in_forward_mode, transforms_active
from moe_fn.weights.prepare import _restore_weights, down_to_panels, gate_up_to_panels
from moe_fn.weights.quantize import dequantize_weights
from moe_fn.weights.shapes import is_prepared

Routed = Callable[[MoEConfig, MoEWeights, Tensor, Routing], Tensor]


def routed_experts(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> Tensor:
    """Tokens through their experts and back: x [T, Hx] -> [T, Hx].

        y[t] = sum over j of  w[t, j] * expert_{ids[t, j]}(x[t])

    Laws
        The fused kernel equals the stages.
    """
    backend = backend_of(config, x)
    problem = _why_unfused(config, weights, x, routing, backend)
    if problem is None:
        return BY_OP[backend](config, weights, x, routing)
    if config.recompute:
        raise ValueError(
            f"MoEConfig.recompute=True with {problem}: expected False, and torch.utils.checkpoint around the layer"
        )
    return dispatch_experts_combine(config, weights, x, routing)


def dispatch_experts_combine(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> Tensor:
    """The three stages of the contract, whose arguments the layer has checked."""
    dispatched = _dispatch(config, x, routing)
    rows = _experts(config, weights, dispatched)
    return _combine(config, rows, dispatched, routing)


def _why_unfused(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing, backend: str) -> str | None:
    """Why no op does all of it, in words.

    Gradients through rounded activations are what the stages say that they are.
    """
    if config.expert_norm is not None:  # it needs whole rows before the sum
        return "an expert_norm"
    if in_forward_mode():
        return "forward mode"
    problem = EXPERTS_PROBLEMS[backend](config.json)
    if problem is not None or config.quant is None:
        return problem
    if config.quant.activations is not None and _differentiates(weights, x, routing.weights):
        return "gradients through activations that are rounded"
    return QUANT_PROBLEMS[backend](
        config.quant.json, config.expert_hidden_size, config.intermediate_size, x.device.type
    )


EXPERTS_PROBLEMS: dict[str, Callable[[str], str | None]] = {
    "torch": in_torch.experts_problem,
    "native": on_cpu.experts_problem,
    "triton": on_gpu.experts_problem,
}
QUANT_PROBLEMS: dict[str, Callable[[str, int, int, str], str | None]] = {
    "native": on_cpu.quant_problem,
    "triton": on_gpu.quant_problem,
}


def _by_op(op: Kernel, config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> Tensor:
    """The three stages by one op. With the weights on the input each slot is a token of its own."""
    check_draft_export("routed_experts")
    if config.router.weight_on == "input":
        return weighted_slots(config, x, routing, lambda x, one: op(*_arguments(config, weights, x, one))[0])
    y: Tensor
    y, _ = op(*_arguments(config, weights, x, routing))
    return y


def by_triton_op(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> Tensor:
    """One op of 4 kernels, 2 where nearly every slot has an expert of its own: nothing waits for the device between
    them.
    """
    return _by_op(triton_op, config, _restore_weights(config, weights), x, routing)


def weighted_slots(
    config: MoEConfig, x: Tensor, routing: Routing, experts: Callable[[Tensor, Routing], Tensor]
) -> Tensor:
    """Weights on the input: each slot is a token of its own, w * x, with one expert; the sum over a token's slots comes
    after.
    """
    ids, w, adapters = routing.expert_ids, routing.weights, routing.adapter_ids
    slots = weighted(config, x.unsqueeze(1), w.unsqueeze(-1)).flatten(0, 1)
    adapters = None if adapters is None else adapters.unsqueeze(1).expand(ids.shape).flatten()
    one = Routing(expert_ids=ids.reshape(-1, 1), weights=torch.ones_like(w).reshape(-1, 1), adapter_ids=adapters)
    y = experts(slots, one)
    wide = y.unflatten(0, (-1, config.top_k)).to(accumulation_dtype(y.dtype))
    return y if config.top_k == 1 else ARITHMETIC[config.batch_invariant].sum_dim(wide, 1).to(y.dtype)


def _arguments(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> tuple[Any, ...]:
    """The op's arguments, with `keep`."""
    ids, w = routing.expert_ids, routing.weights
    return *flat(packed(config, weights, x, ids, w, routing.adapter_ids)), _keeps(config, weights, x, w)


def _keeps(config: MoEConfig, weights: MoEWeights, x: Tensor, w: Tensor) -> bool:
    """Whether what the activations got is kept for gradients: 2 of 9 parts of all products, for rows x 2I elements."""
    if config.recompute or config.chunk_tokens is not None:  # chunks are there to bound memory
        return False
    return _differentiates(weights, x, w)


def _differentiates(weights: MoEWeights, x: Tensor, w: Tensor) -> bool:
    lora = weights.lora
    adapters = () if lora is None else (lora.gate_up_a, lora.gate_up_b, lora.down_a, lora.down_b)
    inputs = (x, w, weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias, *adapters)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def _in_torch(*args: Any) -> tuple[Tensor, Tensor]:
    return dispatch_experts_combine(*unpacked(arguments_of(args[:-1]))), args[0].new_empty(0)


def _backward(
    backend: str, op: Kernel, args: list[Any], needed: list[bool], pre: Tensor, gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors, from the arguments and pre: by `op`, or below torch.func's transforms by ops that
    batch.
    """
    arguments = arguments_of(args[:-1])
    given, needed_of = (dict(zip(ARGUMENTS, values, strict=False)) for values in (args, needed))
    wanted = [bool(needed_of[name]) and given[name] is not None for name in DIFFERENTIABLE]
    config, weights, x, _ = unpacked(arguments)
    plain = _restore_weights(config, weights)
    plain = plain if config.quant is None else dequantize_weights(config, plain, x.dtype)[1]
    plain_args = pre, *flat(with_floats(arguments, plain))
    transformed = transforms_active() or in_forward_mode()
    found = _gradients(backend, gradient, wanted, *plain_args) if transformed else op(gradient, wanted, *plain_args)
    of = {name: g for name, g, want in zip(DIFFERENTIABLE, found, wanted, strict=True) if want}
    if is_prepared(weights.gate_up):
        panels = {"gate_up": gate_up_to_panels, "down": down_to_panels}
        of |= {name: panels[name](config, of[name]) for name in panels if name in of}
    return *(of.get(name) for name in ARGUMENTS), None  # keep is the last argument


def _gradients(backend: str, gradient: Tensor, wanted: list[bool], pre: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """What routed_experts_backward computes, in the grouped ops of a back-end: the first product always again, for pre
    has no derivative.

    d a = down[e].T @ g;  d w = a . d a + down_bias . g; d h = activation'(h) * w * d a; d x = sum of gate_up[e].T @ d h
    """
    config, weights, x, routing = unpacked(arguments_of(args))
    if config.lora is not None:
        return _gradients_of_stages(gradient, wanted, args)
    ops, wide, transposed = GROUPED[backend], accumulation_dtype(x.dtype), config.weight_layout == "out_in"
    arithmetic = ARITHMETIC[config.batch_invariant]
    product = functools.partial(ops.matmul, invariant=config.batch_invariant)
    d = _dispatch(config, x, routing)
    ends, rows = d.expert_ends, d.rows

    def spread(bias: Tensor) -> Tensor:
        return spread_over_rows(backend, bias, ends, rows.shape[0])

    hidden = product(rows, weights.gate_up, ends, transposed).to(wide)
    hidden = hidden if weights.gate_up_bias is None else hidden + spread(weights.gate_up_bias)
    activation = functools.partial(
        activate, as_activation(config.activation), layout=config.gate_up_layout, arithmetic=arithmetic
    )
    a, pull = vjp(activation, hidden)[:2]
    g = gather_rows(gradient, d.slot_of_row, d.row_of_slot, config.top_k)
    d_a = product(g, weights.down, ends, not transposed).to(wide)

    present = has_expert(rows.shape[0], ends)
    w = gather_rows(routing.weights.reshape(-1, 1), d.slot_of_row, d.row_of_slot, 1)
    w = torch.where(present, w, 0).to(wide)
    d_w = arithmetic.row_sum(d_a * a)
    d_w = d_w if weights.down_bias is None else d_w + arithmetic.row_sum(g.to(wide) * spread(weights.down_bias))
    d_w = gather_rows(torch.where(present, d_w, 0), d.row_of_slot, d.slot_of_row, 1).view_as(routing.weights)
    d_hidden = pull(d_a * w)[0].to(x.dtype)

    def of_x() -> Tensor:
        d_slots = gather_rows(product(d_hidden, weights.gate_up, ends, not transposed), d.row_of_slot, d.slot_of_row, 1)
        return arithmetic.sum_dim(d_slots.unflatten(0, (-1, config.top_k)).to(wide), 1).to(x.dtype)

    def outer(left: Tensor, right: Tensor) -> Tensor:
        return ops.outer(left, right, ends) if transposed else ops.outer(right, left, ends)

    # of w * rows over each expert's rows, in fixed order
    def sums(rows: Tensor, w: Tensor, like: Tensor | None) -> Tensor:
        of_expert = ops.outer(w.to(rows.dtype), rows, ends).squeeze(1)
        return of_expert if like is None else of_expert.to(like.dtype)

    def none() -> Tensor:  # one for each: results of an op are not each other's aliases
        return x.new_empty(0)

    return (
        of_x() if wanted[0] else none(),
        d_w.to(routing.weights.dtype) if wanted[1] else none(),
        outer(d_hidden, rows) if wanted[2] else none(),
        outer(g, (a * w).to(x.dtype)) if wanted[3] else none(),
        sums(d_hidden, torch.ones_like(w), weights.gate_up_bias) if wanted[4] else none(),
        sums(g, w, weights.down_bias) if wanted[5] else none(),
        *(none() for _ in wanted[6:]),  # of adapters, which this layer does not have
    )


def _gradients_of_stages(gradient: Tensor, wanted: list[bool], args: Sequence[Any]) -> tuple[Tensor, ...]:
    """The same by differentiating the stages, for layers with adapters."""
    names = [name for name, want in zip(DIFFERENTIABLE, wanted, strict=True) if want]
    places = [list(ARGUMENTS).index(name) for name in names]

    def function(*moved: Tensor) -> Tensor:
        return dispatch_experts_combine(*unpacked(arguments_of(_with(list(args), places, moved))))

    of = dict(zip(names, vjp(function, *(args[place] for place in places))[1](gradient), strict=True))
    return tuple(of[name] if name in of else gradient.new_empty(0) for name in DIFFERENTIABLE)


def _second_backward(
    backend: str, inputs: list[Any], needed: list[bool], *cotangents: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of the gradients, through the grouped ops."""
    wanted = inputs[1]
    places = [list(ARGUMENTS).index(name) for name in DIFFERENTIABLE]
    # the gradient, and after it, what is needed and pre the arguments
    moving = [i for i in (0, *(3 + place for place in places)) if needed[i] and inputs[i] is not None]

    def function(*moved: Tensor) -> tuple[Tensor, ...]:
        found = _gradients(backend, *_with(inputs, moving, moved))
        return tuple(g for g, want in zip(found, wanted, strict=True) if want)

    values, pull = vjp(function, *(inputs[i] for i in moving))[:2]
    given = [c for c, want in zip(cotangents, wanted, strict=True) if want]
    second = pull(tuple(torch.zeros_like(v) if c is None else c for v, c in zip(values, given, strict=True)))
    return tuple(_with([None] * len(inputs), moving, second))


def _with(args: list[Any], places: list[int], values: Sequence[Any]) -> list[Any]:
    """The arguments, with other values in some places."""
    value_of_place = dict(zip(places, values, strict=True))
    return [value_of_place.get(i, a) for i, a in enumerate(args)]


native_backward_op = define_routed_experts_backward(
    "native",
    kernel=functools.partial(native.run, "routed_experts_backward", functools.partial(_gradients, "native")),
    backward=functools.partial(_second_backward, "native"),
)
native_op = define_routed_experts(
    "native",
    kernel=functools.partial(native.run, "routed_experts", _in_torch),
    backward=lambda *args: _backward("native", native_backward_op, *args),
)
triton_backward_op = define_routed_experts_backward(
    "triton",
    kernel=functools.partial(gpu.run, "routed_experts_backward"),
    backward=functools.partial(_second_backward, "triton"),
)
triton_op = define_routed_experts(
    "triton",
    kernel=functools.partial(gpu.run, "routed_experts"),
    backward=lambda *args: _backward("triton", triton_backward_op, *args),
)

by_native_op: Routed = functools.partial(_by_op, native_op)  # the hidden rows stay in the cache
BY_OP: dict[str, Routed] = {"native": by_native_op, "triton": by_triton_op}
