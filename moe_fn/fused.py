"""Dispatch, experts, combine: one after the other, or as the one op of a back-end that has a kernel for all three.

Why an op: the loop over experts is ragged, and what is fused here (copies of tokens, the activation, the weighted sum) stays in the
cache instead of going through memory as rows x hidden buffers, which cost as much as the products from 256 tokens on. What would
remove it: an Inductor that generates grouped products with a gather in front and a weighted scatter behind.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_fn.activations import activate
from moe_fn.backends import backend_of
from moe_fn.config import ActivationConfig, MoEConfig, ZeroExpertsConfig, as_activation
from moe_fn.numerics import accumulation_dtype
from moe_fn.ops.grouped import GROUPED, spread_over_rows
from moe_fn.ops.routed import NUM_TENSORS, define_routed_experts
from moe_fn.ops.rows import gather_rows
from moe_fn.preparing import is_prepared, lay_panels, restore_weights
from moe_fn.records import MoEWeights, Routing
from moe_fn.stages.combine import combine
from moe_fn.stages.dispatch import dispatch
from moe_fn.stages.experts import experts

Routed = Callable[[MoEConfig, MoEWeights, Tensor, Routing], Tensor]


def routed_experts(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> Tensor:
    """Tokens through their experts and back: x [T, Hx] -> [T, Hx].

        y[t] = sum over j of  w[t, j] * expert_{ids[t, j]}(x[t])

    Laws
        The fused kernel equals the stages.
    """
    backend = "torch" if config.expert_norm is not None else backend_of(config, x)  # a norm needs whole rows before the sum
    return ROUTED[backend](config, weights, x, routing)


def by_stages(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> Tensor:
    """The three stages of the contract."""
    dispatched = dispatch(config, x, routing)
    rows = experts(config, weights, dispatched)
    return combine(config, rows, dispatched, routing)


def by_native_op(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> Tensor:
    """One op; the hidden rows stay in the cache."""
    w = routing.weights
    if config.router.weight_on == "input":
        x, w = (x.to(w.dtype) * w).to(x.dtype), torch.ones_like(w)  # top_k = 1: one weight a token
    a = as_activation(config.activation)
    y: Tensor = routed_experts_op(
        x, routing.expert_ids, w, weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias,
        config.intermediate_size, config.weight_layout == "out_in", a.function, a.gated, config.gate_up_layout == "interleaved",
        a.alpha, a.up_offset, a.limit, a.limit_at == "output", a.gate_cap, a.up_cap,
    )  # fmt: skip
    return y


ROUTED: dict[str, Routed] = {"torch": by_stages, "native": by_native_op}


@functools.lru_cache
def _config_of(
    num_experts: int, top_k: int, hidden: int, intermediate: int, transposed: bool, function: Any, gated: bool, interleaved: bool,
    alpha: float, up_offset: float, limit: float | None, limit_output: bool, gate_cap: float | None, up_cap: float | None,
) -> MoEConfig:  # fmt: skip
    """What by_native_op told the op, as a config again."""
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        zero_experts=ZeroExpertsConfig(count=top_k - num_experts) if top_k > num_experts else None,  # who else could be chosen
        hidden_size=hidden,
        intermediate_size=intermediate,
        activation=ActivationConfig(
            function=function,
            gated=gated,
            limit=limit,
            limit_at="output" if limit_output else "input",
            alpha=alpha,
            up_offset=up_offset,
            gate_cap=gate_cap,
            up_cap=up_cap,
        ),
        gate_up_layout="interleaved" if interleaved else "packed",
        weight_layout="out_in" if transposed else "in_out",
    )


def _unpacked(args: Any) -> tuple[MoEConfig, MoEWeights, Tensor, Routing]:
    x, ids, w, gate_up, down, gate_up_bias, down_bias = args[:NUM_TENSORS]
    config = _config_of(int(gate_up.shape[0]), int(ids.shape[1]), int(x.shape[1]), *args[NUM_TENSORS:])
    weights = MoEWeights(gate_up=gate_up, down=down, gate_up_bias=gate_up_bias, down_bias=down_bias)
    return config, weights, x, Routing(expert_ids=ids, weights=w)


def _in_torch(*args: Any) -> Tensor:
    return by_stages(*_unpacked(args))


def _backward(args: list[Any], needed: list[bool], gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors, from the arguments alone: the first product is computed again, the second never.

    d a = down[e].T @ g;  d w = a . d a + down_bias . g;  d h = activation'(h) * w * d a;  d x = sum of gate_up[e].T @ d h
    """
    config, weights, x, routing = _unpacked(args)
    plain = restore_weights(config, weights)
    ops, wide, transposed = GROUPED["native"], accumulation_dtype(x.dtype), config.weight_layout == "out_in"
    d = dispatch(config, x, routing)
    ends, rows = d.expert_ends, d.rows

    def spread(bias: Tensor) -> Tensor:
        return spread_over_rows("native", bias, ends, rows.shape[0])

    hidden = ops.matmul(rows, plain.gate_up, ends, transposed).to(wide)
    hidden = hidden if weights.gate_up_bias is None else hidden + spread(weights.gate_up_bias)
    activation = functools.partial(activate, as_activation(config.activation), layout=config.gate_up_layout)
    a, pull = torch.func.vjp(activation, hidden)[:2]
    g = gather_rows(gradient, d.slot_of_row, d.row_of_slot, config.top_k)
    d_a = ops.matmul(g, plain.down, ends, not transposed).to(wide)

    has_expert = (torch.arange(rows.shape[0], device=x.device) < ends[-1]).unsqueeze(1)
    w = gather_rows(routing.weights.reshape(-1, 1), d.slot_of_row, d.row_of_slot, 1)
    w = torch.where(has_expert, w, 0).to(wide)
    d_w = (d_a * a).sum(-1, keepdim=True)
    d_w = d_w if weights.down_bias is None else d_w + (g.to(wide) * spread(weights.down_bias)).sum(-1, keepdim=True)
    d_w = gather_rows(torch.where(has_expert, d_w, 0), d.row_of_slot, d.slot_of_row, 1).view_as(routing.weights)
    d_hidden = pull(d_a * w)[0].to(x.dtype)
    d_x = gather_rows(ops.matmul(d_hidden, plain.gate_up, ends, not transposed), d.row_of_slot, d.slot_of_row, 1)
    d_x = d_x.unflatten(0, (-1, config.top_k)).sum(1, dtype=wide).to(x.dtype)

    def outer(left: Tensor, right: Tensor) -> Tensor:
        return ops.outer(left, right, ends) if transposed else ops.outer(right, left, ends)

    d_gate_up = outer(d_hidden, rows) if needed[3] else None
    d_down = outer(g, (a * w).to(x.dtype)) if needed[4] else None
    if is_prepared(weights.gate_up) and d_gate_up is not None and d_down is not None:
        d_gate_up, d_down = lay_panels(config, d_gate_up, d_down)
    d_gate_up_bias = _segment_sums(d_hidden, torch.ones_like(w), ends, weights.gate_up_bias) if needed[5] else None
    d_down_bias = _segment_sums(g, w, ends, weights.down_bias) if needed[6] else None
    gradients = (d_x, None, d_w.to(routing.weights.dtype), d_gate_up, d_down, d_gate_up_bias, d_down_bias)
    return *gradients, *(None,) * (len(args) - NUM_TENSORS)


def _segment_sums(rows: Tensor, w: Tensor, ends: Tensor, like: Tensor | None) -> Tensor | None:
    """Sum of w * rows over the rows of each expert, in fixed order: [R, N] -> [E, N]."""
    return None if like is None else GROUPED["native"].outer(w.to(rows.dtype), rows, ends).squeeze(1).to(like.dtype)


def _jvp(args: list[Any], *tangents: Any) -> Tensor:
    """The tangent, as the gradient of a gradient: v -> (d y / d args).T v is linear in v, and its transpose is what is wanted."""
    moving = [i for i, tangent in enumerate(tangents[:NUM_TENSORS]) if tangent is not None]

    def function(*moved: Tensor) -> Tensor:
        by_position = dict(zip(moving, moved, strict=True))
        return _in_torch(*(by_position.get(i, a) for i, a in enumerate(args)))

    y, pull = torch.func.vjp(function, *(args[i] for i in moving))[:2]
    tangent: Tensor = torch.func.vjp(pull, torch.zeros_like(y))[1](tuple(tangents[i] for i in moving))[0]
    return tangent


routed_experts_op = define_routed_experts(_in_torch, _backward, _jvp)
