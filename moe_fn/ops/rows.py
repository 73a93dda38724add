"""Sorting of slots into rows, and a gather of rows whose gradient is a gather: without atomics, so deterministic.

The gradient of torch's index_select is a scatter with atomic adds under Inductor (measured: two runs differ in the last
bit for top_k > 2).
"""

from typing import Any

import torch
from torch import Tensor

from moe_fn.numerics import accumulation_dtype
from moe_fn.ops.define import batch_end_to_end, batch_to_front, define_op
from moe_fn.torch_compat import transforms_active


def _gather(x: Tensor, index: Tensor, inverse: Tensor, repeat: int) -> Tensor:
    return x.index_select(0, index // repeat if repeat > 1 else index)


def _gather_backward(inputs: list[Any], needed: list[bool], gradient: Tensor) -> tuple[Tensor | None, ...]:
    _, index, inverse, repeat = inputs
    gradient = gather_rows(gradient, inverse, index, 1)
    if repeat > 1:
        gradient = (
            gradient.view(-1, repeat, gradient.shape[1])
            .sum(1, dtype=accumulation_dtype(gradient.dtype))
            .to(gradient.dtype)
        )
    return gradient, None, None, None


def _gather_vmap(info: Any, in_dims: Any, x: Tensor, index: Tensor, inverse: Tensor, repeat: int) -> tuple[Tensor, int]:
    batch = info.batch_size
    x = batch_to_front(x, in_dims[0], batch)
    rows = x.shape[1] * repeat
    index, inverse = (batch_end_to_end(i, d, batch, rows) for i, d in ((index, in_dims[1]), (inverse, in_dims[2])))
    return gather_rows(x.flatten(0, 1), index, inverse, repeat).unflatten(0, (batch, -1)), 0


_gather_op = define_op(
    "gather_rows(Tensor x, Tensor index, Tensor inverse, int repeat) -> Tensor",
    kernel=_gather,
    fake=lambda x, index, inverse, repeat: x.new_empty(index.shape[0], x.shape[1]),
    vmap=_gather_vmap,
    backward=_gather_backward,
    jvp=lambda inputs, x_tangent, *_: gather_rows(x_tangent, *inputs[1:]),
    visible=_gather,
)


def gather_rows(x: Tensor, index: Tensor, inverse: Tensor, repeat: int) -> Tensor:
    """x[index // repeat], where index is a permutation of range(len(x) * repeat) with the given inverse.

    x [T, H], index and inverse [T * repeat] -> [T * repeat, H]. Its gradient is a gather by `inverse` and a sum over
    `repeat`. Why an op: autograd does not know that index is a permutation. The graph has an aten index_select, which
    Inductor fuses.
    """
    rows: Tensor = _gather_op(x, index, inverse, repeat)
    return rows


def sort_slots(key_of_slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(key_of_row, slot_of_row, row_of_slot) of a stable sort of slots by key: [S] int64 each.

    >>> key_of_row, slot_of_row, row_of_slot = sort_slots(torch.tensor([2, 0, 2, 1]))
    >>> key_of_row.tolist(), slot_of_row.tolist(), row_of_slot.tolist()
    ([0, 1, 2, 2], [1, 3, 0, 2], [2, 0, 3, 1])
    """
    key_of_row, slot_of_row = key_of_slot.sort(stable=True)
    slots = torch.arange(key_of_slot.shape[0], device=key_of_slot.device)
    return key_of_row, slot_of_row, torch.zeros_like(slot_of_row).scatter(0, slot_of_row, slots)


def ends_of_keys(key_of_row: Tensor, count: int) -> Tensor:
    """The end of the rows of each key 0 .. count - 1: sorted keys [R] -> int64 [count].

    >>> ends_of_keys(torch.tensor([0, 1, 2, 2]), 2).tolist()
    [1, 2]
    """
    keys = torch.arange(count, device=key_of_row.device, dtype=key_of_row.dtype)
    return count_up_to(key_of_row, keys)


def count_up_to(ascending: Tensor, values: Tensor) -> Tensor:
    """The number of elements of `ascending` that are <= each value: [n], [m] of one dtype -> int64 [m].

    >>> count_up_to(torch.tensor([0, 2, 2, 5]), torch.tensor([1, 2])).tolist()
    [1, 3]
    """
    if transforms_active():
        # a copy for every sample: searchsorted warns about a view made by vmap
        values = values + ascending.new_zeros(1)
    return torch.searchsorted(ascending, values, right=True)


def has_expert(num_rows: int, expert_ends: Tensor) -> Tensor:
    """Whether each row has an expert, as a column: bool [num_rows, 1].

    >>> has_expert(3, torch.tensor([1, 2])).flatten().tolist()
    [True, True, False]
    """
    return (torch.arange(num_rows, device=expert_ends.device) < expert_ends[-1]).unsqueeze(1)
