"""Products of sorted rows with the weight of their expert, as ops: the loop over experts cannot be in the graph.

Group g = (segment s, expert e) = divmod(g, experts) owns rows [start, ends[g]) where start is ends[g - 1], or the first row of
its segment for e = 0. Segments (one, but for vmap) split the rows evenly; segments / weight_sets of them in a row share a
weight: so a batch of problems is one call instead of a loop. Rows past their segment's last end belong to nobody: they give 0,
and are never read, so NaN there goes nowhere.
"""

from typing import Any

from torch import Tensor

from moe_fn.kernels import torch_grouped as kernels
from moe_fn.ops.define import batch_end_to_end, batch_to_front, define_op


def _matmul_fake(rows: Tensor, weight: Tensor, ends: Tensor, transposed: bool, segments: int, weight_sets: int) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1] if transposed else weight.shape[2])


def _matmul_backward(inputs: list[Any], needed: list[bool], gradient: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, ends, transposed, *sets = inputs
    d_rows = grouped_matmul(gradient, weight, ends, not transposed, *sets) if needed[0] else None
    left, right = (gradient, rows) if transposed else (rows, gradient)
    d_weight = grouped_outer(left, right, ends, *sets) if needed[1] else None
    return d_rows, d_weight, None, None, None, None


def _matmul_jvp(inputs: list[Any], rows_tangent: Tensor | None, weight_tangent: Tensor | None, *_: Any) -> Any:
    rows, weight, *rest = inputs
    parts = [] if rows_tangent is None else [grouped_matmul(rows_tangent, weight, *rest)]
    return sum(parts + ([] if weight_tangent is None else [grouped_matmul(rows, weight_tangent, *rest)]))


def _matmul_vmap(
    info: Any, in_dims: Any, rows: Tensor, weight: Tensor, ends: Tensor, transposed: bool, segments: int, weight_sets: int
) -> tuple[Tensor, int]:
    batch = info.batch_size
    rows = batch_to_front(rows, in_dims[0], batch)
    if in_dims[1] is not None or weight_sets > 1:
        weight, weight_sets = batch_to_front(weight, in_dims[1], batch).flatten(0, 1), weight_sets * batch
    ends = batch_end_to_end(ends, in_dims[2], batch, rows.shape[1])
    out = grouped_matmul(rows.flatten(0, 1), weight, ends, transposed, segments * batch, weight_sets)
    return out.unflatten(0, (batch, rows.shape[1])), 0


def _outer_fake(left: Tensor, right: Tensor, ends: Tensor, segments: int, weight_sets: int) -> Tensor:
    return left.new_empty(weight_sets * (ends.shape[0] // segments), left.shape[1], right.shape[1])


def _outer_backward(inputs: list[Any], needed: list[bool], gradient: Tensor) -> tuple[Tensor | None, ...]:
    left, right, ends, *sets = inputs
    d_left = grouped_matmul(right, gradient, ends, True, *sets) if needed[0] else None
    d_right = grouped_matmul(left, gradient, ends, False, *sets) if needed[1] else None
    return d_left, d_right, None, None, None


def _outer_jvp(inputs: list[Any], left_tangent: Tensor | None, right_tangent: Tensor | None, *_: Any) -> Any:
    left, right, *rest = inputs
    parts = [] if left_tangent is None else [grouped_outer(left_tangent, right, *rest)]
    return sum(parts + ([] if right_tangent is None else [grouped_outer(left, right_tangent, *rest)]))


def _outer_vmap(info: Any, in_dims: Any, left: Tensor, right: Tensor, ends: Tensor, segments: int, weight_sets: int) -> tuple[Tensor, int]:
    batch = info.batch_size
    left, right = batch_to_front(left, in_dims[0], batch), batch_to_front(right, in_dims[1], batch)
    ends = batch_end_to_end(ends, in_dims[2], batch, left.shape[1])
    # A sum over segments that shared a weight must now be kept apart by sample: as many weight sets as samples, times those there were.
    out = grouped_outer(left.flatten(0, 1), right.flatten(0, 1), ends, segments * batch, weight_sets * batch)
    return out.unflatten(0, (batch, -1)), 0


_matmul_op = define_op(
    "grouped_matmul(Tensor rows, Tensor weight, Tensor ends, bool transposed, SymInt segments, SymInt weight_sets) -> Tensor",
    kernel=kernels.grouped_matmul,
    fake=_matmul_fake,
    vmap=_matmul_vmap,
    backward=_matmul_backward,
    jvp=_matmul_jvp,
)
_outer_op = define_op(
    "grouped_outer(Tensor left, Tensor right, Tensor ends, SymInt segments, SymInt weight_sets) -> Tensor",
    kernel=kernels.grouped_outer,
    fake=_outer_fake,
    vmap=_outer_vmap,
    backward=_outer_backward,
    jvp=_outer_jvp,
)


def grouped_matmul(rows: Tensor, weight: Tensor, ends: Tensor, transposed: bool, segments: int = 1, weight_sets: int = 1) -> Tensor:
    """rows[r] @ weight[e] (weight[e].T if transposed) for the expert e of row r.

    rows [R, K], weight [E, K, N] (transposed: [E, N, K]), ends [E] int32 -> [R, N]. Accumulates in float32 or wider, rounds once.
    Why an op: the loop over experts is ragged, and torch's own grouped product traces in bfloat16 only (torch 2.13) and leaves
    rows past the last end uninitialised. What would remove it: torch.nn.functional.grouped_mm with float32 and float16 fakes.
    """
    out: Tensor = _matmul_op(rows, weight, ends, transposed, segments, weight_sets)
    return out


def grouped_outer(left: Tensor, right: Tensor, ends: Tensor, segments: int = 1, weight_sets: int = 1) -> Tensor:
    """left[rows of e].T @ right[rows of e] for every expert e: the gradient of a weight.

    left [R, M], right [R, N], ends [E] int32 -> [E, M, N]; experts without rows give 0. Why an op: as grouped_matmul.
    """
    out: Tensor = _outer_op(left, right, ends, segments, weight_sets)
    return out


def spread_over_rows(values: Tensor, ends: Tensor, num_rows: int) -> Tensor:
    """values[e] for the expert e of each row, 0 for rows of no expert: [E, N] -> [R, N].

    A product with ones, so that its gradient is a segment sum in fixed order instead of a scatter with atomics.
    """
    return grouped_matmul(values.new_ones(num_rows, 1), values.unsqueeze(1), ends, False)
