"""Which weights share a scale: tensor, channel, group and block are one thing, a tile of (outputs, inputs)."""

import torch
from torch import Tensor

from moe_fn.config import MoEConfig

Tile = tuple[int | None, int | None]  # None: all there are
WHOLE: Tile = (None, None)


def halves_of(config: MoEConfig, name: str) -> int:
    """Parts of a matrix's outputs that are tiled apart: gate and up of a packed gate_up, which checkpoints bring one by
    one.
    """
    return config.gate_up_parts if name == "gate_up" and config.gate_up_layout == "packed" else 1


def scale_shape(tile: Tile, halves: int, outputs: int, inputs: int) -> tuple[int, int]:
    """Scales of one matrix: (tiles along the outputs, along the inputs).

    >>> scale_shape((128, 128), 2, 2 * 192, 256)
    (4, 2)
    """
    of_half = outputs // halves
    return halves * -(-of_half // (tile[0] or of_half)), -(-inputs // (tile[1] or inputs))


def expand_tiles(scale: Tensor, tile: Tile, halves: int, outputs: int, inputs: int) -> Tensor:
    """Each tile's number at all its places: [E, tiles, tiles] -> [E, outputs, inputs].

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
    """The numbers of each tile, zeros where it reaches past the matrix: [E, outputs, inputs] -> [E, tiles, tiles,
    numbers].
    """
    of_half, inputs = weight.shape[1] // halves, weight.shape[2]
    out, inner = tile[0] or of_half, tile[1] or inputs
    by_half: Tensor = weight.unflatten(1, (halves, of_half))
    padded = torch.nn.functional.pad(by_half, (0, -inputs % inner, 0, -of_half % out))
    tiles: Tensor = padded.unflatten(3, (-1, inner)).unflatten(2, (-1, out))
    return tiles.transpose(3, 4).flatten(4).flatten(1, 2)
