"""Dispatch, experts and combine as one op, for back-ends with a kernel for all three, and its gradients as another op.

`moe_fn::routed_experts_<backend>` saves its arguments for the backward pass and, with `keep`, the pre-activations
(`pre`: rows x 2I); without them `moe_fn::routed_experts_backward_<backend>` computes the first product again. Each
such back-end has its own pair of ops, as in `moe_fn.ops.grouped_matmul`.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from moe_fn.kernels.arguments import (
    ARGUMENTS,
    DIFFERENTIABLE,
    SCHEMA,
    TENSORS,
    RoutedExpertsArguments,
    arguments_of,
)
from moe_fn.ops.define import Gradients, Kernel, batch_to_front, define_op
from moe_fn.ops.flops import slots_with_expert
from moe_fn.records import LoRAWeights

_TOKENS = ("x", "expert_ids", "expert_weights", "adapter_ids")  # tensors of tokens; the others are of experts
_ADAPTERS = tuple(field.name for field in dataclasses.fields(LoRAWeights))  # experts are their second dim
_RESULTS = ", ".join(["Tensor"] * len(DIFFERENTIABLE))


def define_routed_experts(backend: str, kernel: Kernel, backward: Gradients) -> Kernel:
    """Defines the op: x [T, H], expert_ids [T, k] integers, expert_weights [T, k] float, weights, ..., keep -> y [T, H]
    and pre.

    The other arguments are those of `moe_fn.kernels.arguments`. pre [T * k, columns of gate_up], in slots sorted by
    expert, is saved for the backward and has no gradient; it is empty without `keep`. The op has no forward mode: a
    rule of an op cannot start transforms (torch 2.13 fails an assertion), so callers compose other ops for it.
    """
    op = define_op(
        f"routed_experts_{backend}({SCHEMA}, bool keep) -> (Tensor, Tensor)",
        kernel=kernel,
        fake=_fake,
        vmap=lambda info, in_dims, *args: _vmap(op, info.batch_size, in_dims, args),
        backward=backward,
        keeps=1,
        flops=_flops,
    )
    return op


def define_routed_experts_backward(backend: str, kernel: Kernel, backward: Gradients) -> Kernel:
    """Defines the op: gradient [T, H], needed (one bool for each of DIFFERENTIABLE), pre, the arguments -> their
    gradients, empty where not needed.

    Weights are plain floats. Under transforms of torch.func the grouped ops replace it, so it has no batching rule.
    """
    return define_op(
        f"routed_experts_backward_{backend}(Tensor gradient, bool[] needed, Tensor pre, {SCHEMA}) -> ({_RESULTS})",
        kernel=kernel,
        fake=_gradients_fake,
        vmap=_no_vmap,
        backward=backward,
        flops=_backward_flops,
    )


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    a, keep = arguments_of(args[:-1]), args[-1]
    columns = a.intermediate_size * a.activation.gate_up_parts
    slots = a.expert_ids.shape[0] * a.expert_ids.shape[1]
    return a.x.new_empty(a.x.shape), a.x.new_empty((slots, columns) if keep else (0,))


def _gradients_fake(gradient: Tensor, needed: list[bool], pre: Tensor, *args: Any) -> tuple[Tensor, ...]:
    given = dict(zip(ARGUMENTS, args, strict=True))
    wanted = (given[name] if need else None for name, need in zip(DIFFERENTIABLE, needed, strict=True))
    return tuple(gradient.new_empty(0) if t is None else t.new_empty(t.shape) for t in wanted)


def _sizes_of_products(a: RoutedExpertsArguments) -> tuple[int, int]:
    """The numbers of multiplications of the first and of the second product."""
    of_down: int = slots_with_expert(a.expert_ids, a.gate_up.shape[0]) * a.x.shape[1] * a.intermediate_size
    return of_down * a.activation.gate_up_parts, of_down


def _sizes_of_adapters(a: RoutedExpertsArguments) -> dict[str, int]:
    """The numbers of multiplications of all rows' products with each matrix of adapters."""
    if a.lora is None:
        return dict.fromkeys(_ADAPTERS, 0)
    matrices = {name: getattr(a.lora, name) for name in _ADAPTERS}
    ids, count = a.expert_ids, next(t for t in matrices.values() if t is not None).shape[0]
    if a.adapter_ids is not None:
        adapters = a.adapter_ids.unsqueeze(1)
        ids = torch.where((adapters >= 0) & (adapters < count), ids, -1)
    rows = slots_with_expert(ids, a.gate_up.shape[0])
    return {name: 0 if t is None else rows * t.shape[2] * t.shape[3] for name, t in matrices.items()}


def _flops(*args: Any, out_val: Any) -> int:
    a = arguments_of(args[:-1])
    return 2 * (sum(_sizes_of_products(a)) + sum(_sizes_of_adapters(a).values()))


def _backward_flops(gradient: Tensor, needed: list[bool], pre: Tensor, *args: Any, out_val: Any) -> int:
    a = arguments_of(args)
    (first, second), adapters = _sizes_of_products(a), _sizes_of_adapters(a)
    of, again = dict(zip(DIFFERENTIABLE, needed, strict=True)), pre.ndim != 2
    times = {  # of an adapter's matrix: forward again, to the gradient of its input, and its own gradient
        "gate_up_a": again + of["gate_up_b"] + of["x"] + of["gate_up_a"],
        "gate_up_b": again + (of["x"] or of["gate_up_a"]) + of["gate_up_b"],
        "down_a": of["down_b"] + 1 + of["down_a"],
        "down_b": 1 + of["down_b"],
    }
    total = first * (again + of["x"] + of["gate_up"]) + second * (1 + of["down"])
    return 2 * (total + sum(count * adapters[name] for name, count in times.items()))


def _no_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    raise ValueError(
        "moe_fn::routed_experts_backward_* has no batching rule; under torch.func the grouped ops replace it"
    )


def _vmap(
    op: Kernel, batch: int, in_dims: Any, args: tuple[Any, ...]
) -> tuple[tuple[Tensor, Tensor], tuple[int, None]]:
    """The batching rule: a batch of tokens becomes more tokens, a batch of weights more experts.

    `keep` is False: under transforms gradients are computed without saved pre-activations.
    """
    of, dim = (dict(zip(ARGUMENTS, values, strict=True)) for values in (args[:-1], in_dims[:-1]))
    experts = [name for name in TENSORS if name not in _TOKENS and of[name] is not None]
    of_tokens = [name for name in _TOKENS if of[name] is not None]
    for name in of_tokens:
        of[name] = batch_to_front(of[name], dim[name], batch)
    tokens, ids = of["x"].shape[1], of["expert_ids"]
    if any(dim[name] is not None for name in experts):
        for name in experts:
            of[name] = batch_to_front(of[name], dim[name], batch)
        count = of["gate_up"].shape[1]
        first = torch.arange(batch, device=ids.device).view(-1, 1, 1) * count
        of["expert_ids"] = torch.where((ids >= 0) & (ids < count), ids + first, -1)
        for name in (name for name in experts if name in _ADAPTERS):
            each = of[name].expand(-1, -1, count, -1, -1)  # where experts share a matrix the samples do not
            of[name] = each.transpose(0, 1).flatten(1, 2)
        of |= {name: of[name].flatten(0, 1) for name in experts if name not in _ADAPTERS}
    of |= {name: of[name].flatten(0, 1) for name in of_tokens}
    out, pre = op(*of.values(), False)
    return (out.unflatten(0, (batch, tokens)), pre), (0, None)
