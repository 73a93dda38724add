"""Dispatch, experts and combine as one op, where one kernel does all three, and its gradients as another.

`moe_fn::routed_experts_<backend>` keeps for its gradients its arguments and, if asked to, what the activations got
(`pre`: rows x 2I); without that `moe_fn::routed_experts_backward_<backend>` computes the first product again. Each
back-end with such kernels has a pair of ops of its own, as in `moe_fn.ops.grouped_matmul`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_fn.ops.define import Gradients, Kernel, batch_to_front, define_op
from moe_fn.ops.flops import slots_with_expert

_ARGUMENTS = (
    "Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? "
    "down_bias, "
    "Tensor? gate_up_scale, Tensor? down_scale, Tensor? gate_up_zero_point, Tensor? down_zero_point, Tensor? "
    "gate_up_global_scale, "
    "Tensor? down_global_scale, Tensor? gate_up_input_scale, Tensor? down_input_scale, "
    "int intermediate_size, bool transposed, str function, bool gated, bool interleaved, float alpha, float up_offset, "
    "float? limit, "
    "bool limit_output, float? gate_cap, float? up_cap, str quant, bool invariant"
)
_RESULTS = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"
NUM_TENSORS = 15  # the arguments that are tensors come first
DIFFERENTIABLE = (0, 2, 3, 4, 5, 6)  # which of them have gradients


def define_routed_experts(backend: str, kernel: Kernel, backward: Gradients) -> Kernel:
    """The op: x [T, H], expert_ids [T, k] integers, expert_weights [T, k] float, weights plain or prepared, keep -> y
    [T, H], pre.

    quant is "" or a QuantConfig's text; the eight tensors before intermediate_size are then the leaves of QuantWeights,
    in their order. invariant: no bit of a token's result depends on the other tokens. pre [T * k, columns of gate_up],
    slots sorted by expert, is without gradient, for the backward; empty unless kept. There is no forward mode: a rule
    of an op cannot itself start transforms (torch 2.13 fails an assertion), so callers compose other ops for it.
    """
    op = define_op(
        f"routed_experts_{backend}({_ARGUMENTS}, bool keep) -> (Tensor, Tensor)",
        kernel=kernel,
        fake=_fake,
        vmap=lambda info, in_dims, *args: _vmap(op, info.batch_size, in_dims, args),
        backward=backward,
        keeps=1,
        flops=_flops,
    )
    return op


def define_routed_experts_backward(backend: str, kernel: Kernel, backward: Gradients) -> Kernel:
    """The op: gradient [T, H], needed (one bool for each of DIFFERENTIABLE), pre, the arguments -> their gradients,
    empty where not needed.

    Weights are plain floats. Below transforms of torch.func the grouped ops stand in its place, so it has no batching
    rule of its own.
    """
    return define_op(
        f"routed_experts_backward_{backend}(Tensor gradient, bool[] needed, Tensor pre, {_ARGUMENTS}) -> ({_RESULTS})",
        kernel=kernel,
        fake=_gradients_fake,
        vmap=_no_vmap,
        backward=backward,
        flops=_backward_flops,
    )


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    x, ids, gated, keep = args[0], args[1], args[NUM_TENSORS + 3], args[-1]
    columns = args[NUM_TENSORS] * (2 if gated else 1)
    return x.new_empty(x.shape), x.new_empty((ids.shape[0] * ids.shape[1], columns) if keep else (0,))


def _gradients_fake(gradient: Tensor, needed: list[bool], pre: Tensor, *args: Any) -> tuple[Tensor, ...]:
    wanted = (args[i] if need else None for i, need in zip(DIFFERENTIABLE, needed, strict=True))
    return tuple(gradient.new_empty(0) if a is None else a.new_empty(a.shape) for a in wanted)


def _sizes_of_products(args: Sequence[Any]) -> tuple[int, int]:
    """Multiplications of the first product and of the second one."""
    x, ids, gate_up, inner, gated = args[0], args[1], args[3], args[NUM_TENSORS], args[NUM_TENSORS + 3]
    of_down: int = slots_with_expert(ids, gate_up.shape[0]) * x.shape[1] * inner
    return of_down * (2 if gated else 1), of_down


def _flops(*args: Any, out_val: Any) -> int:
    return 2 * sum(_sizes_of_products(args))


def _backward_flops(gradient: Tensor, needed: list[bool], pre: Tensor, *args: Any, out_val: Any) -> int:
    first, second = _sizes_of_products(args)
    of_x, _, of_gate_up, of_down, *_ = needed
    return 2 * (first * ((pre.ndim != 2) + of_x + of_gate_up) + second * (1 + of_down))


def _no_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    raise ValueError(
        "moe_fn::routed_experts_backward_* has no batching rule; below torch.func the grouped ops stand in its place"
    )


def _vmap(
    op: Kernel, batch: int, in_dims: Any, args: tuple[Any, ...]
) -> tuple[tuple[Tensor, Tensor], tuple[int, None]]:
    """A batch of tokens is more tokens; a batch of weights is more experts.

    Nothing is kept: below transforms gradients start anew.
    """
    x, ids, weights = (batch_to_front(a, d, batch) for a, d in zip(args[:3], in_dims[:3], strict=True))
    leaves, dims = args[3:NUM_TENSORS], in_dims[3:NUM_TENSORS]
    if any(d is not None for d in dims):
        batched = [None if a is None else batch_to_front(a, d, batch) for a, d in zip(leaves, dims, strict=True)]
        experts = next(a.shape[1] for a in batched if a is not None)
        first = torch.arange(batch, device=ids.device).view(-1, 1, 1) * experts
        ids = torch.where((ids >= 0) & (ids < experts), ids + first, -1)
        leaves = tuple(None if a is None else a.flatten(0, 1) for a in batched)
    out, pre = op(x.flatten(0, 1), ids.flatten(0, 1), weights.flatten(0, 1), *leaves, *args[NUM_TENSORS:-1], False)
    return (out.unflatten(0, (batch, x.shape[1])), pre), (0, None)
