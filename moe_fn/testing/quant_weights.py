"""Random quantized weights for a config: drawn as codes and scales, so that every code and unusual scales occur."""

import math

import torch
from torch import Tensor

from moe_fn.config import MoEConfig, QuantConfig
from moe_fn.config.quant import ELEMENTS
from moe_fn.records import QuantWeights
from moe_fn.reference.quant import VALUES, numbers_of

Size = tuple[int, int, int]


def codes_for(
    config: MoEConfig, like: dict[str, Tensor], generator: torch.Generator
) -> tuple[dict[str, Tensor], QuantWeights]:
    """gate_up and down as codes on the device of `like` (float weights [E, out, in]), and their QuantWeights.

    The decoded weights have a standard deviation of about 1/sqrt(fan in).
    """
    quant = config.quant
    if quant is None:
        raise ValueError("codes_for: config.quant is None; expected a QuantConfig")
    codes: dict[str, Tensor] = {}
    scales: dict[str, Tensor | None] = {}
    for name, floats in like.items():
        device, size = floats.device, (floats.shape[0], floats.shape[1], floats.shape[2])
        halves = config.gate_up_parts if name == "gate_up" and config.gate_up_layout == "packed" else 1
        codes[name], spread = _codes(quant, size, generator)
        shape = (size[0], halves * _tiles(size[1] // halves, quant.tile[0]), _tiles(size[2], quant.tile[1]))
        made = _scales_of_codes(quant, shape, halves, 1 / (spread * math.sqrt(size[2])), generator)
        codes[name] = codes[name].to(device)
        scales |= {f"{name}_{what}": None if t is None else t.to(device) for what, t in made.items()}
    return codes, QuantWeights(**scales)


def _tiles(size: int, tile: int | None) -> int:
    return -(-size // (tile or size))


def _codes(quant: QuantConfig, size: Size, generator: torch.Generator) -> tuple[Tensor, float]:
    """Random codes (normal values where codes are floats, else uniform codes), and the standard deviation of their
    values.
    """
    experts, outputs, inputs = size
    element, values = ELEMENTS[quant.row.element], torch.tensor(VALUES[quant.row.element], dtype=torch.float64)
    if element.dtype.is_floating_point:
        largest = float(values.nan_to_num().max())
        deviation = largest / 4.48
        codes = (torch.randn(size, generator=generator) * deviation).clamp(-largest, largest)
        return codes.to(element.dtype), deviation
    size = (experts, outputs, inputs * element.bits // 8)
    codes = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    return codes if quant.zero_points else codes.view(element.dtype), float(values.std())


def _scales_of_codes(
    quant: QuantConfig, shape: Size, halves: int, unit: float, generator: torch.Generator
) -> dict[str, Tensor | None]:
    """Scales near `unit`, zero points near the middle, static scales for activations up to about 4."""
    factor = torch.rand(shape, generator=generator) + 0.5
    scale, above = unit * factor, None
    if quant.row.scale == "e8m0":
        scale = (127 + math.floor(math.log2(unit)) + torch.randint(-1, 2, shape, generator=generator)).to(torch.uint8)
    elif quant.row.has_global_scale:
        scale, above = (
            (factor * 100).to(torch.float8_e4m3fn),
            unit / 100 * (torch.rand(shape[0], halves, 1, generator=generator) + 0.5),
        )
    elif quant.row.element == "int4":  # published formats have positive scales; negative ones are valid too
        scale = scale * torch.where(torch.rand(shape, generator=generator) < 0.5, -1, 1)
    middle = 2 ** (quant.row.bits - 1)
    zero = (
        torch.randint(middle - 3, middle + 4, shape, generator=generator).to(torch.uint8) if quant.zero_points else None
    )
    static = None
    if quant.activations is not None and quant.activations.static:
        row = quant.activations.row
        largest = numbers_of(row.element)[-1] * (numbers_of(row.scale)[-1] if row.has_global_scale else 1)
        static = 4 / largest * (torch.rand(shape[0], generator=generator) + 0.5)
    return {"scale": scale, "zero_point": zero, "global_scale": above, "input_scale": static}
