"""Grouped product with quantized weights: an expert's codes are decoded when its rows are multiplied.

Why an op: in plain tensor code the decoded weights of all experts would be a float tensor in the graph, saved for the
backward, which only needs the codes. Obsolete when autograd recomputes values that are cheap to compute from saved
ones. The codes have no gradient.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_fn.config import QuantConfig
from moe_fn.config.quant import quant_of_json
from moe_fn.kernels.torch import quantized
from moe_fn.kernels.triton import call as gpu
from moe_fn.kernels.triton.support import decodes
from moe_fn.ops.define import Kernel, batch_end_to_end, batch_to_front, define_op
from moe_fn.ops.flops import rows_with_expert
from moe_fn.ops.grouped_matmul import GROUPED
from moe_fn.quant.codes import Codes
from moe_fn.torch_compat import check_draft_export

_SCHEMA = (
    "quantized_matmul{}(Tensor rows, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? global_scale, Tensor "
    "ends, str quant, "
    "int halves, bool transposed, SymInt segments, SymInt weight_sets, bool invariant) -> Tensor"
)
_WEIGHTS = slice(1, 5)  # arguments: weight, scale, zero_point, global_scale


def quantized_matmul(
    backend: str,
    rows: Tensor,
    stored: Codes,
    ends: Tensor,
    quant: QuantConfig,
    halves: int,
    transposed: bool = True,
    invariant: bool = False,
) -> Tensor:
    """rows[r] @ W[e].T for the expert e of row r (W[e] if not transposed); W are the decoded weights, rounded to the
    dtype of rows.

    rows [R, K] -> [R, N], by the grouped product of `backend`; 0 for rows without an expert. invariant: a row's bits do
    not depend on the other rows.
    """
    parts = stored.codes, stored.scale, stored.zero_point, stored.global_scale
    check_draft_export("quantized_matmul")
    out: Tensor = OPS[backend](rows, *parts, ends, quant.json, halves, transposed, 1, 1, invariant)
    return out


def _fake(
    rows: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Any,
    above: Any,
    ends: Tensor,
    quant: str,
    halves: int,
    transposed: bool,
    *sets: Any,
) -> Tensor:
    return rows.new_empty(
        rows.shape[0], weight.shape[1] if transposed else weight.shape[2] * quant_of_json(quant).per_byte
    )


def _kernel(
    backend: str, rows: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, global_scale: Tensor | None,
    ends: Tensor,
    quant: str, halves: int, transposed: bool, segments: int, weight_sets: int, invariant: bool,
) -> Tensor:  # fmt: skip
    one_set = transposed and segments == 1 and weight_sets == 1
    if backend == "triton" and one_set and decodes(quant, weight.shape[2] * quant_of_json(quant).per_byte):
        parts = weight, scale, zero_point, global_scale
        product: Tensor = gpu.run("quantized_matmul", rows, *parts, ends, quant_of_json(quant), halves, invariant)
        return product
    stored = Codes(codes=weight, scale=scale, zero_point=zero_point, global_scale=global_scale)
    of_expert = partial(_product, backend, invariant)
    return quantized.quantized_matmul(
        rows, stored, ends, quant_of_json(quant), halves, transposed, segments, weight_sets, of_expert
    )


def _product(backend: str, invariant: bool, rows: Tensor, weight: Tensor) -> Tensor:
    """Product of the rows of one expert with its decoded weight [K, N]."""
    if not invariant:
        return torch.mm(rows, weight)
    ends = torch.full((1,), rows.shape[0], dtype=torch.int32, device=rows.device)
    return GROUPED[backend].matmul(rows, weight.unsqueeze(0), ends, False, invariant=True)


def _backward(backend: str, inputs: list[Any], needed: list[bool], gradient: Tensor) -> tuple[Tensor | None, ...]:
    _, *weights_and_ends, quant, halves, transposed, segments, weight_sets, invariant = inputs
    d_rows = (
        OPS[backend](gradient, *weights_and_ends, quant, halves, not transposed, segments, weight_sets, invariant)
        if needed[0]
        else None
    )
    return d_rows, *(None,) * (len(inputs) - 1)


def _jvp(backend: str, inputs: list[Any], rows_tangent: Tensor | None, *_: Any) -> Any:
    return 0 if rows_tangent is None else OPS[backend](rows_tangent, *inputs[1:])


def _vmap(backend: str, info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    batch = info.batch_size
    rows, weights, ends = args[0], list(args[_WEIGHTS]), args[_WEIGHTS.stop]
    *rest, segments, weight_sets, invariant = args[_WEIGHTS.stop + 1 :]
    rows = batch_to_front(rows, in_dims[0], batch)
    if any(d is not None for d in in_dims[_WEIGHTS]) or weight_sets > 1:
        weights = [
            None if w is None else batch_to_front(w, d, batch).flatten(0, 1)
            for w, d in zip(weights, in_dims[_WEIGHTS], strict=True)
        ]
        weight_sets = weight_sets * batch
    ends = batch_end_to_end(ends, in_dims[_WEIGHTS.stop], batch, rows.shape[1])
    out = OPS[backend](rows.flatten(0, 1), *weights, ends, *rest, segments * batch, weight_sets, invariant)
    return out.unflatten(0, (batch, rows.shape[1])), 0


def _flops(rows: Tensor, *args: Any, out_val: Tensor) -> int:
    *_, ends, _, _, _, segments, _, _ = args
    return 2 * rows_with_expert(ends, rows.shape[0], segments) * rows.shape[1] * out_val.shape[1]


def _define(backend: str, suffix: str) -> Kernel:
    return define_op(
        _SCHEMA.format(suffix),
        kernel=partial(_kernel, backend),
        fake=_fake,
        vmap=partial(_vmap, backend),
        backward=partial(_backward, backend),
        jvp=partial(_jvp, backend),
        flops=_flops,
    )


torch_matmul = _define("torch", "")
native_matmul = _define("native", "_native")
triton_matmul = _define("triton", "_triton")
OPS: dict[str, Kernel] = {"torch": torch_matmul, "native": native_matmul, "triton": triton_matmul}
