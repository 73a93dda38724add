"""What shapes and dtypes codes, scales and what stands beside them have."""

import torch
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.quant.tiles import halves_of, scale_shape
from moe_fn.records import Path, Shape


def shapes_of_quant(config: MoEConfig, gate_up: Shape, down: Shape) -> dict[Path, Shape]:
    """Shapes of all that must stand beside the codes gate_up and down of these shapes."""
    quant = config.quant
    shapes: dict[Path, Shape] = {}
    if quant is None:
        return shapes
    for name, codes in (("gate_up", gate_up), ("down", down)):
        experts, halves = codes[0], halves_of(config, name)
        outputs, inputs = scale_shape(quant.tile, halves, codes[1][1], codes[2][1] * quant.per_byte)
        tiles = (experts, ("tiles of outputs", outputs), ("tiles of inputs", inputs))
        shapes[("quant", f"{name}_scale")] = tiles
        if quant.zero_points:
            shapes[("quant", f"{name}_zero_point")] = tiles
        if quant.row.scale == "e4m3":
            shapes[("quant", f"{name}_global_scale")] = (experts, ("halves", halves), ("1", 1))
        if quant.activations is not None and quant.activations.static:
            shapes[("quant", f"{name}_input_scale")] = (experts,)
    return shapes


def dtypes_of_quant(config: MoEConfig) -> dict[Path, tuple[torch.dtype, ...]]:
    """Dtypes that codes, scales and zero points may have; nothing without quant."""
    quant = config.quant
    found: dict[Path, tuple[torch.dtype, ...]] = {}
    if quant is None:
        return found
    of_codes = {"e4m3": torch.float8_e4m3fn, "int8": torch.uint8 if quant.zero_points else torch.int8}
    floats = (torch.float32, torch.bfloat16, torch.float16)
    scale = {"float": floats, "e8m0": (torch.uint8,), "e4m3": (torch.float8_e4m3fn,)}[quant.row.scale]
    for name in ("gate_up", "down"):
        found[(name,)] = (of_codes.get(quant.row.element, torch.uint8),)
        found[("quant", f"{name}_scale")] = scale
        found[("quant", f"{name}_zero_point")] = (torch.uint8,)
        found[("quant", f"{name}_global_scale")] = found[("quant", f"{name}_input_scale")] = (torch.float32,)
    return found


def check_sizes(where: str, config: MoEConfig, parts: dict[str, Tensor], per_byte: int) -> None:
    """[E, out, in], `per_byte` numbers of an output in an element."""
    own, hidden = config.own, config.expert_hidden_size
    gate_up = own.num_experts, own.gate_up_size, hidden // per_byte
    for name, expected in (("gate_up", gate_up), ("down", (own.num_experts, hidden, own.intermediate_size // per_byte))):
        if tuple(parts[name].shape) != expected:
            raise ValueError(f"{where}: weights.{name} is {list(parts[name].shape)} as [E, out, in]; expected {list(expected)}")
