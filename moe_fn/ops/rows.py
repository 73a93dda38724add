"""A gather whose gradient is a gather too: no atomics, so the same bits every run.

The gradient of torch's own index_select is a scatter with atomic adds under Inductor (measured: two runs differ in the last
bit for top_k > 2).
"""

from typing import Any

from torch import Tensor

from moe_fn.numerics import accumulation_dtype
from moe_fn.ops.define import batch_end_to_end, batch_to_front, define_op


def _gather(x: Tensor, index: Tensor, inverse: Tensor, repeat: int) -> Tensor:
    return x.index_select(0, index // repeat if repeat > 1 else index)


def _gather_backward(inputs: list[Any], needed: list[bool], gradient: Tensor) -> tuple[Tensor | None, ...]:
    _, index, inverse, repeat = inputs
    gradient = gather_rows(gradient, inverse, index, 1)
    if repeat > 1:
        gradient = gradient.unflatten(0, (-1, repeat)).sum(1, dtype=accumulation_dtype(gradient.dtype)).to(gradient.dtype)
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
    """x[index // repeat], where index is a permutation of range(len(x) * repeat) and inverse undoes it.

    x [T, H], index and inverse [T * repeat] -> [T * repeat, H]. Its gradient is a gather by `inverse` and a sum over `repeat`.
    Why an op: only so can the gradient know that index is a permutation; the graph gets an aten index_select, which Inductor fuses.
    """
    rows: Tensor = _gather_op(x, index, inverse, repeat)
    return rows
