"""Tiles of weights that share a scale: tensor, channel, group and block are tiles of (outputs, inputs)."""

import torch
from torch import Tensor

from moe_fn.config import MoEConfig

Tile = tuple[int | None, int | None]  # (outputs, inputs); None: all
WHOLE: Tile = (None, None)


def halves_of(config: MoEConfig, name: str) -> int:
    """The number of parts of a matrix's outputs that are tiled separately.

    2 for gate and up of a packed gate_up, which checkpoints store as separate tensors.
    """
    return config.gate_up_parts if name == "gate_up" and config.gate_up_layout == "packed" else 1


def scale_shape(tile: Tile, halves: int, outputs: int, inputs: int) -> tuple[int, int]:
    """Shape of one matrix's scales: (tiles along the outputs, tiles along the inputs).

    >>> scale_shape((128, 128), 2, 2 * 192, 256)
    (4, 2)
    """
    of_half = outputs // halves
    return halves * -(-of_half // (tile[0] or of_half)), -(-inputs // (tile[1] or inputs))


def expand_tiles(scale: Tensor, tile: Tile, halves: int, outputs: int, inputs: int) -> Tensor:
    """Repeats the value of each tile over the tile: [E, tiles, tiles] -> [E, outputs, inputs].

    >>> expand_tiles(torch.tensor([[[1, 2]]]), (1, 2), 1, 1, 3).tolist()
    [[[1, 1, 2]]]
    """
    of_half = outputs // halves
    by_half: Tensor = scale.unflatten(1, (halves, -1))
    rows = _repeated(by_half, 2, tile[0] or of_half).narrow(2, 0, of_half).flatten(1, 2)
    return _repeated(rows, 2, tile[1] or inputs).narrow(2, 0, inputs)


def _repeated(t: Tensor, dim: int, times: int) -> Tensor:
    if times == 1:
        return t
    shape = [*t.shape[: dim + 1], times, *t.shape[dim + 1 :]]
    repeated: Tensor = t.unsqueeze(dim + 1).expand(shape).flatten(dim, dim + 1)
    return repeated


def by_tile(weight: Tensor, tile: Tile, halves: int) -> Tensor:
    """The weights of each tile, padded with zeros at the edges: [E, outputs, inputs] -> [E, tiles, tiles, weights]."""
    of_half, inputs = weight.shape[1] // halves, weight.shape[2]
    out, inner = tile[0] or of_half, tile[1] or inputs
    by_half: Tensor = weight.unflatten(1, (halves, of_half))
    padded = torch.nn.functional.pad(by_half, (0, -inputs % inner, 0, -of_half % out))
    tiles: Tensor = padded.unflatten(3, (-1, inner)).unflatten(2, (-1, out))
    return tiles.transpose(3, 4).flatten(4).flatten(1, 2)
