"""The grouped products of moe_fn.ops.grouped_matmul with the Triton kernels."""

import torch
from torch import Tensor

from moe_fn.config import QuantConfig
from moe_fn.kernels.triton.outer import grouped_outer as outer_of_groups
from moe_fn.kernels.triton.products import grouped_product
from moe_fn.kernels.triton.quant.inputs import Rows as Left
from moe_fn.kernels.triton.quant.matrix import matrix_of
from moe_fn.kernels.triton.quant.products import quantized_product
from moe_fn.kernels.triton.quant.tiles import coded_tile
from moe_fn.kernels.triton.slots import tiles_of_groups
from moe_fn.kernels.triton.tiles import architecture_of, outer_tile, product_tile, rows_of_tiles
from moe_fn.quant.codes import Codes


def grouped_matmul(
    rows: Tensor, weight: Tensor, ends: Tensor, transposed: bool, segments: int, weight_sets: int, invariant: bool
) -> Tensor:
    """rows [R, K] @ weight [weight_sets * E, K, N] (transposed: [.., N, K]) by group: [R, N]; ends [segments * E]
    int32.
    """
    weight = weight.mT if transposed else weight
    num_rows, groups = rows.shape[0], ends.shape[0]
    inner, columns = weight.shape[-2:]
    tile_rows = rows_of_tiles(num_rows, groups, invariant)
    tile = product_tile(tile_rows, groups, inner, columns, rows.element_size(), architecture_of(rows.device))
    tile_map = tiles_of_groups(starts_of_groups(ends, num_rows, segments), ends, num_rows, tile.rows)
    shared = None if segments == weight_sets else _weight_of_group(ends, segments, weight_sets)
    return grouped_product(rows, weight, ends, tile_map, tile, weight_of_group=shared, zero_rest=True)


def quantized_matmul(
    rows: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, global_scale: Tensor | None, ends: Tensor,
    quant: QuantConfig,
    halves: int, invariant: bool,
) -> Tensor:  # fmt: skip
    """rows [R, K] @ W.T by group: [R, N]. W is decoded from codes [E, N, K / codes per byte]; ends [E] int32."""
    matrix = matrix_of(
        quant, Codes(codes=weight, scale=scale, zero_point=zero_point, global_scale=global_scale), halves
    )
    (experts, columns, _), num_rows, arch = matrix.shape, rows.shape[0], architecture_of(rows.device)
    tile_rows = rows_of_tiles(num_rows, experts, invariant)
    tile = coded_tile(
        "decoded_product", tile_rows, experts, columns, weight.shape[2], matrix.shared, rows.element_size(), arch
    )
    tile_map = tiles_of_groups(starts_of_groups(ends, num_rows, 1), ends, num_rows, tile.rows)
    return quantized_product(Left(values=rows.contiguous()), matrix, ends, tile_map, tile, rows.dtype, zero_rest=True)


def grouped_outer(left: Tensor, right: Tensor, ends: Tensor, segments: int, weight_sets: int) -> Tensor:
    """left[rows of e].T @ right[rows of e] for each group: [weight_sets * E, M, N]. left [R, M], right [R, N], ends
    [segments * E] int32.
    """
    num_rows, groups = left.shape[0], ends.shape[0]
    tile = outer_tile(
        num_rows, groups, left.shape[1], right.shape[1], left.element_size(), architecture_of(left.device)
    )
    starts = starts_of_groups(ends, num_rows, segments)
    if segments == weight_sets:
        return outer_of_groups(left, right, starts, ends, tile)
    by_segment = outer_of_groups(left, right, starts, ends, tile, dtype=torch.float32)
    summed: Tensor = by_segment.unflatten(0, (weight_sets, segments // weight_sets, -1)).sum(1)
    return summed.flatten(0, 1).to(left.dtype)


def starts_of_groups(ends: Tensor, num_rows: int, segments: int) -> Tensor:
    """The first row of each group: the end of the group before it, or its segment's first row."""
    by_segment = ends.unflatten(0, (segments, -1))
    first = torch.arange(segments, device=ends.device, dtype=ends.dtype).unsqueeze(1) * (num_rows // segments)
    starts: Tensor = torch.cat([first, by_segment.narrow(1, 0, by_segment.shape[1] - 1)], 1)
    return starts.flatten()


def _weight_of_group(ends: Tensor, segments: int, weight_sets: int) -> Tensor:
    """The index of each group's weight; consecutive segments share a set of weights."""
    experts = ends.shape[0] // segments
    group = torch.arange(ends.shape[0], device=ends.device, dtype=torch.int32)
    return group // experts * weight_sets // segments * experts + group % experts
