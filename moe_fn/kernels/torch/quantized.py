"""Grouped products with weights that are codes, in plain torch: on the CPU expert by expert, so only the floats of one
are there.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_fn.config import QuantConfig
from moe_fn.kernels.torch.grouped import _groups, grouped_matmul
from moe_fn.kernels.torch.support import quant_problem
from moe_fn.quant.codes import Codes, decoded

Product = Callable[[Tensor, Tensor], Tensor]  # rows [R, K], weight [K, N] -> [R, N]


def quantized_matmul(
    rows: Tensor, stored: Codes, ends: Tensor, quant: QuantConfig, halves: int, transposed: bool, segments: int,
    weight_sets: int,
    product: Product = torch.mm,
) -> Tensor:  # fmt: skip
    """The product of `moe_fn.ops.quantized_matmul`; off the CPU all experts are decoded: which of them are hit is not
    known there.
    """
    wrong = quant_problem(quant.json)
    if wrong is not None:
        raise ValueError(f"quantized_matmul: {wrong}")
    if rows.device.type != "cpu":
        return grouped_matmul(rows, decoded(quant, stored, halves, rows.dtype), ends, transposed, segments, weight_sets)
    columns = stored.codes.shape[1] if transposed else stored.codes.shape[2] * quant.per_byte
    out = rows.new_zeros(rows.shape[0], columns)
    for index, start, end in _groups(ends, rows.shape[0], segments, weight_sets):
        if end > start:
            weight = decoded(quant, _of_expert(stored, index), halves, rows.dtype)[0]
            out[start:end] = product(rows[start:end], weight.t() if transposed else weight)
    return out


def _of_expert(stored: Codes, index: int) -> Codes:
    def own(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[index : index + 1]

    return Codes(
        codes=stored.codes[index : index + 1],
        scale=stored.scale[index : index + 1],
        zero_point=own(stored.zero_point),
        global_scale=own(stored.global_scale),
    )
