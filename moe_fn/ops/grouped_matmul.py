"""Grouped products: sorted rows times the weight of their expert, as ops.

Group g = (segment s, expert e) = divmod(g, experts) has rows [start, ends[g]) where start is ends[g - 1], or the first
row of its segment for e = 0. Segments (more than one only under vmap) split the rows evenly; segments / weight_sets
consecutive segments share a weight, so that a batch of problems is one call. Rows past their segment's last end have
no expert: their result is 0 and they are never read, so NaN in them does not propagate.

Each back-end has its own pair of ops: a graph shows which one runs, and the gradient runs in the product's back-end.

Why ops: the loop over experts is ragged, and torch's grouped product traces only in bfloat16 (torch 2.13) and leaves
rows past the last end uninitialized. Obsolete when torch.nn.functional.grouped_mm has float32 and float16 fakes.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_fn.kernels.native import call as native
from moe_fn.kernels.native import support as on_cpu
from moe_fn.kernels.torch import grouped
from moe_fn.kernels.triton import call as gpu
from moe_fn.kernels.triton import support as on_gpu
from moe_fn.ops.define import Kernel, batch_end_to_end, batch_to_front, define_op
from moe_fn.ops.flops import rows_with_expert


@dataclass(frozen=True)
class GroupedOps:
    """The two products of a back-end; both accumulate in float32 or wider and round once."""

    matmul_op: Kernel
    outer_op: Kernel
    dtypes: tuple[torch.dtype, ...] | None = None  # None: all

    def matmul(
        self,
        rows: Tensor,
        weight: Tensor,
        ends: Tensor,
        transposed: bool,
        segments: int = 1,
        weight_sets: int = 1,
        invariant: bool = False,
    ) -> Tensor:
        """rows[r] @ weight[e] (weight[e].T if transposed) for the expert e of row r.

        rows [R, K], weight [E, K, N] (transposed: [E, N, K]), ends [E] int32 -> [R, N]. invariant: a row's bits do not
        depend on the other rows.
        """
        out: Tensor = self.matmul_op(rows, weight, ends, transposed, segments, weight_sets, invariant)
        return out

    def outer(self, left: Tensor, right: Tensor, ends: Tensor, segments: int = 1, weight_sets: int = 1) -> Tensor:
        """left[rows of e].T @ right[rows of e] for every expert e: the gradient of a weight.

        left [R, M], right [R, N], ends [E] int32 -> [E, M, N]; 0 for experts without rows.
        """
        out: Tensor = self.outer_op(left, right, ends, segments, weight_sets)
        return out


def _matmul_fake(rows: Tensor, weight: Tensor, ends: Tensor, transposed: bool, *_: Any) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1] if transposed else weight.shape[2])


def _outer_fake(left: Tensor, right: Tensor, ends: Tensor, segments: int, weight_sets: int) -> Tensor:
    return left.new_empty(weight_sets * (ends.shape[0] // segments), left.shape[1], right.shape[1])


def _matmul_backward(
    backend: str, inputs: list[Any], needed: list[bool], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    ops = GROUPED[backend]
    rows, weight, ends, transposed, segments, weight_sets, invariant = inputs
    d_rows = ops.matmul(gradient, weight, ends, not transposed, segments, weight_sets, invariant) if needed[0] else None
    left, right = (gradient, rows) if transposed else (rows, gradient)
    d_weight = ops.outer(left, right, ends, segments, weight_sets) if needed[1] else None
    return d_rows, d_weight, *(None,) * (len(inputs) - 2)


def _matmul_jvp(
    backend: str, inputs: list[Any], rows_tangent: Tensor | None, weight_tangent: Tensor | None, *_: Any
) -> Any:
    ops = GROUPED[backend]
    rows, weight, *rest = inputs
    parts = [] if rows_tangent is None else [ops.matmul(rows_tangent, weight, *rest)]
    return sum(parts + ([] if weight_tangent is None else [ops.matmul(rows, weight_tangent, *rest)]))


def _matmul_vmap(
    backend: str, info: Any, in_dims: Any, rows: Tensor, weight: Tensor, ends: Tensor, transposed: bool, segments: int,
    weight_sets: int,
    invariant: bool,
) -> tuple[Tensor, int]:  # fmt: skip
    ops = GROUPED[backend]
    batch = info.batch_size
    rows = batch_to_front(rows, in_dims[0], batch)
    if in_dims[1] is not None or weight_sets > 1:
        weight, weight_sets = batch_to_front(weight, in_dims[1], batch).flatten(0, 1), weight_sets * batch
    ends = batch_end_to_end(ends, in_dims[2], batch, rows.shape[1])
    out = ops.matmul(rows.flatten(0, 1), weight, ends, transposed, segments * batch, weight_sets, invariant)
    return out.unflatten(0, (batch, rows.shape[1])), 0


def _outer_backward(backend: str, inputs: list[Any], needed: list[bool], gradient: Tensor) -> tuple[Tensor | None, ...]:
    ops = GROUPED[backend]
    left, right, ends, *sets = inputs
    d_left = ops.matmul(right, gradient, ends, True, *sets) if needed[0] else None
    d_right = ops.matmul(left, gradient, ends, False, *sets) if needed[1] else None
    return d_left, d_right, None, None, None


def _outer_jvp(
    backend: str, inputs: list[Any], left_tangent: Tensor | None, right_tangent: Tensor | None, *_: Any
) -> Any:
    ops = GROUPED[backend]
    left, right, *rest = inputs
    parts = [] if left_tangent is None else [ops.outer(left_tangent, right, *rest)]
    return sum(parts + ([] if right_tangent is None else [ops.outer(left, right_tangent, *rest)]))


def _outer_vmap(
    backend: str, info: Any, in_dims: Any, left: Tensor, right: Tensor, ends: Tensor, segments: int, weight_sets: int
) -> tuple[Tensor, int]:
    ops = GROUPED[backend]
    batch = info.batch_size
    left, right = batch_to_front(left, in_dims[0], batch), batch_to_front(right, in_dims[1], batch)
    ends = batch_end_to_end(ends, in_dims[2], batch, left.shape[1])
    # Sums over segments that share a weight are separate for each sample: batch * weight_sets sets.
    out = ops.outer(left.flatten(0, 1), right.flatten(0, 1), ends, segments * batch, weight_sets * batch)
    return out.unflatten(0, (batch, -1)), 0


def _matmul_flops(
    rows: Tensor, weight: Tensor, ends: Tensor, transposed: bool, segments: int, *_: Any, out_val: Tensor
) -> int:
    return 2 * rows_with_expert(ends, rows.shape[0], segments) * rows.shape[1] * out_val.shape[1]


def _outer_flops(left: Tensor, right: Tensor, ends: Tensor, segments: int, weight_sets: int, out_val: Tensor) -> int:
    return 2 * rows_with_expert(ends, left.shape[0], segments) * left.shape[1] * right.shape[1]


def _define(backend: str, suffix: str, matmul: Kernel, outer: Kernel) -> tuple[Kernel, Kernel]:
    """Defines `grouped_matmul{suffix}` and `grouped_outer{suffix}`, whose gradients are calls of both."""
    return define_op(
        f"grouped_matmul{suffix}(Tensor rows, Tensor weight, Tensor ends, bool transposed, SymInt segments, SymInt "
        "weight_sets, "
        "bool invariant) -> Tensor",
        kernel=matmul,
        fake=_matmul_fake,
        vmap=partial(_matmul_vmap, backend),
        backward=partial(_matmul_backward, backend),
        jvp=partial(_matmul_jvp, backend),
        flops=_matmul_flops,
    ), define_op(
        f"grouped_outer{suffix}(Tensor left, Tensor right, Tensor ends, SymInt segments, SymInt weight_sets) -> Tensor",
        kernel=outer,
        fake=_outer_fake,
        vmap=partial(_outer_vmap, backend),
        backward=partial(_outer_backward, backend),
        jvp=partial(_outer_jvp, backend),
        flops=_outer_flops,
    )


torch_matmul, torch_outer = _define("torch", "", grouped.grouped_matmul, grouped.grouped_outer)
native_matmul, native_outer = _define(
    "native",
    "_native",
    partial(native.run, "grouped_matmul", grouped.grouped_matmul),
    partial(native.run, "grouped_outer", grouped.grouped_outer),
)

triton_matmul, triton_outer = _define(
    "triton", "_triton", partial(gpu.run, "grouped_matmul"), partial(gpu.run, "grouped_outer")
)

GROUPED: dict[str, GroupedOps] = {
    "torch": GroupedOps(torch_matmul, torch_outer),
    "native": GroupedOps(native_matmul, native_outer, on_cpu.DTYPES),
    "triton": GroupedOps(triton_matmul, triton_outer, on_gpu.DTYPES),
}


def spread_over_rows(backend: str, values: Tensor, ends: Tensor, num_rows: int) -> Tensor:
    """values[e] for the expert e of each row, 0 for rows of no expert: [E, N] -> [R, N].

    A product with ones, so that its gradient is a segment sum in fixed order instead of a scatter with atomics.
    """
    dtypes = GROUPED[backend].dtypes
    ops = GROUPED[backend if dtypes is None or values.dtype in dtypes else "torch"]
    return ops.matmul(values.new_ones(num_rows, 1), values.unsqueeze(1), ends, False)
