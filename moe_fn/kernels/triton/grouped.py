"""The grouped products of moe_fn.ops.grouped_matmul, by the kernels of this package."""

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
    """rows [R, K] x weight [weight_sets * E, K, N] (transposed: [.., N, K]), ends [segments * E] int32 -> [R, N]."""
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
    """rows [R, K] x the floats that codes [E, N, K / codes in a byte] stand for, transposed; ends [E] int32
    -> [R, N].
    """
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
    """left[rows of e].T @ right[rows of e]: left [R, M], right [R, N], ends [segments * E] int32 -> [weight_sets * E,
    M, N].
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
    """Where each group begins: at the end of the one before, or at its segment's first row."""
    by_segment = ends.unflatten(0, (segments, -1))
    first = torch.arange(segments, device=ends.device, dtype=ends.dtype).unsqueeze(1) * (num_rows // segments)
    starts: Tensor = torch.cat([first, by_segment.narrow(1, 0, by_segment.shape[1] - 1)], 1)
    return starts.flatten()


def _weight_of_group(ends: Tensor, segments: int, weight_sets: int) -> Tensor:
    """Segments that follow one another share a set of weights."""
    experts = ends.shape[0] // segments
    group = torch.arange(ends.shape[0], device=ends.device, dtype=torch.int32)
    return group // experts * weight_sets // segments * experts + group % experts
