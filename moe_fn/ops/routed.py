"""Dispatch, experts and combine as one op, where one kernel does all three: `moe_fn::routed_experts`.

What it saves for backward are its arguments, nothing else; `moe_fn.fused` gives it gradients made of the grouped ops.
"""

from typing import Any

import torch
from torch import Tensor

from moe_fn.kernels import native
from moe_fn.ops.define import Gradients, Kernel, batch_to_front, define_op

_SCHEMA = (
    "routed_experts(Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, "
    "Tensor? down_bias, int intermediate_size, bool transposed, str function, bool gated, bool interleaved, float alpha, "
    "float up_offset, float? limit, bool limit_output, float? gate_cap, float? up_cap) -> Tensor"
)
NUM_TENSORS = 7  # the arguments that are tensors come first


def define_routed_experts(otherwise: Kernel, backward: Gradients, jvp: Kernel) -> Kernel:
    """The op: x [T, H], expert_ids [T, k] integers, expert_weights [T, k] float, weights plain or prepared -> [T, H].

    `otherwise` computes it in torch where there is no native library; it takes the op's arguments.
    """

    def kernel(*args: Any) -> Tensor:
        fits = args[0].device.type == "cpu" and args[0].dtype in native.DTYPES
        library = native.active() if fits else None
        out: Tensor = otherwise(*args) if library is None or library.problem else library.ops.routed_experts(*args)  # type: ignore[attr-defined]
        return out

    op = define_op(
        _SCHEMA,
        kernel=kernel,
        fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
        vmap=lambda info, in_dims, *args: _vmap(op, info.batch_size, in_dims, args),
        backward=backward,
        jvp=jvp,
    )
    return op


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
