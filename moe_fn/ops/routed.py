"""Dispatch, experts and combine as one op, where one kernel does all three, and its gradients as another; `moe_fn.fused` says why.

`moe_fn::routed_experts` keeps nothing for its gradients but its arguments; `moe_fn::routed_experts_backward` starts from them. Each
back-end with such kernels has a pair of ops of its own, as in `moe_fn.ops.grouped`.
"""

from typing import Any

import torch
from torch import Tensor

from moe_fn.ops.define import Gradients, Kernel, batch_to_front, define_op

_ARGUMENTS = (
    "Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, "
    "int intermediate_size, bool transposed, str function, bool gated, bool interleaved, float alpha, float up_offset, float? limit, "
    "bool limit_output, float? gate_cap, float? up_cap"
)
NUM_TENSORS = 7  # the arguments that are tensors come first
DIFFERENTIABLE = (0, 2, 3, 4, 5, 6)  # which of them have gradients


def define_routed_experts(suffix: str, kernel: Kernel, backward: Gradients, jvp: Kernel) -> Kernel:
    """The op: x [T, H], expert_ids [T, k] integers, expert_weights [T, k] float, weights plain or prepared -> [T, H]."""
    op = define_op(
        f"routed_experts{suffix}({_ARGUMENTS}) -> Tensor",
        kernel=kernel,
        fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
        vmap=lambda info, in_dims, *args: _vmap(op, info.batch_size, in_dims, args),
        backward=backward,
        jvp=jvp,
    )
    return op


def define_routed_experts_backward(suffix: str, kernel: Kernel, backward: Gradients) -> Kernel:
    """The op: gradient [T, H], needed (one bool for each of DIFFERENTIABLE), the arguments -> their gradients, empty where not needed.

    Weights are plain. Below transforms of torch.func the grouped ops stand in its place, so it has no batching rule of its own.
    """
    return define_op(
        f"routed_experts_backward{suffix}(Tensor gradient, bool[] needed, {_ARGUMENTS}) -> ({', '.join(['Tensor'] * len(DIFFERENTIABLE))})",
        kernel=kernel,
        fake=_gradients_fake,
        vmap=_no_vmap,
        backward=backward,
    )


def _gradients_fake(gradient: Tensor, needed: list[bool], *args: Any) -> tuple[Tensor, ...]:
    wanted = (args[i] if need else None for i, need in zip(DIFFERENTIABLE, needed, strict=True))
    return tuple(gradient.new_empty(0) if a is None else a.new_empty(a.shape) for a in wanted)


def _no_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    raise NotImplementedError("moe_fn::routed_experts_backward has no batching rule; below torch.func the grouped ops stand in its place")


def _vmap(op: Kernel, batch: int, in_dims: Any, args: tuple[Any, ...]) -> tuple[Tensor, int]:
    """A batch of tokens is more tokens; a batch of weights is more experts."""
    x, ids, weights = (batch_to_front(a, d, batch) for a, d in zip(args[:3], in_dims[:3], strict=True))
    leaves, dims = args[3:NUM_TENSORS], in_dims[3:NUM_TENSORS]
    if any(d is not None for d in dims):
        batched = [None if a is None else batch_to_front(a, d, batch) for a, d in zip(leaves, dims, strict=True)]
        experts = next(a.shape[1] for a in batched if a is not None)
        first = torch.arange(batch, device=ids.device).view(-1, 1, 1) * experts
        ids = torch.where((ids >= 0) & (ids < experts), ids + first, -1)
        leaves = tuple(None if a is None else a.flatten(0, 1) for a in batched)
    out = op(x.flatten(0, 1), ids.flatten(0, 1), weights.flatten(0, 1), *leaves, *args[NUM_TENSORS:])
    return out.unflatten(0, (batch, x.shape[1])), 0
