"""Prepared weights: gate_up and down stored in panels, the memory layout of the native kernels."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from moe_fn.backends import backend_of
from moe_fn.config import MoEConfig
from moe_fn.kernels.native import library as native
from moe_fn.kernels.native.support import quant_problem
from moe_fn.quant.tiles import expand_tiles, halves_of
from moe_fn.records import MoEWeights, QuantWeights
from moe_fn.weights.check import check_layer
from moe_fn.weights.panels import (
    columns_from_panels,
    columns_to_panels,
    convert_panels,
    weight_from_panels,
    weight_to_panels,
)
from moe_fn.weights.shapes import PER_TILE, expected_weights, is_prepared, prepared_shapes

NAMES = ("gate_up", "down")


def prepare_weights(config: MoEConfig, weights: MoEWeights) -> MoEWeights:
    """Returns the weights with gate_up and down in the memory layout of the back-end that will compute the experts.

        gate_up [E, out, in], down [E, out, in]  ->  [E, panels, steps, 32 * d]:  panel of 32 outputs, step of d inputs

    with d = 1 for float32 and 2 for bfloat16 and float16 (32 bits), outputs and inputs padded with zeros; a panel of a
    gated gate_up has 16 gates, then their 16 ups. Codes of 8 and 4 bits have 4 bytes of a column in a step; their
    scales and zero points become [E, panels, tiles of inputs, 32], one for each column. For other devices, dtypes and
    back-ends the weights are returned unchanged.

    Prepare weights for inference: with plain weights every call makes the panels again. Prepared weights are ordinary
    tensors for compile, export, AOTInductor, `.to(device)`, safetensors and gradients. Autocast uses weights that are
    prepared in its dtype, and codes, without conversion; it converts others in every call. Prepare after loading: the
    copy is in huge pages, which a tensor read from a file is not, and reads 10 to 20 % faster on a virtual machine.
    Optimizers need plain weights.

    Raises ValueError for shapes that do not fit the config.

    Laws
        Prepared weights give the same numbers.
        Restoring undoes preparing.
        Preparing twice is preparing once.

    Source: the panel layout of GotoBLAS (Goto and van de Geijn 2008), which oneDNN and every fast CPU product use.

    >>> config = MoEConfig(num_experts=2, top_k=1, hidden_size=64, intermediate_size=32)
    >>> weights = MoEWeights(gate_up=torch.randn(2, 64, 64), down=torch.randn(2, 64, 32))
    >>> restored = restore_weights(config, prepare_weights(config, weights))
    >>> torch.equal(restored.gate_up, weights.gate_up) and torch.equal(restored.down, weights.down)
    True
    """
    check_layer("prepare_weights", config, weights)
    config = config.own
    _check("prepare_weights", config, weights)
    computed = weights.gate_up if config.quant is None else weights.gate_up.new_empty(0, dtype=torch.float32)
    if backend_of(config, computed) != "native" or is_prepared(weights.gate_up):
        return weights
    quant = weights.quant
    if config.quant is not None:
        sizes = config.expert_hidden_size, config.intermediate_size
        if quant_problem(config.quant.json, *sizes, computed.device.type) is not None:
            return weights
        quant = None if quant is None else _quant_to_panels(config, quant)
    # One matrix at a time: the temporary of gate_up is freed before the one of down is made.
    gate_up = _in_huge_pages(gate_up_to_panels(config, weights.gate_up))
    down = _in_huge_pages(down_to_panels(config, weights.down))
    return dataclasses.replace(weights, gate_up=gate_up, down=down, quant=quant)


def _in_huge_pages(panels: Tensor) -> Tensor:
    return panels if torch.compiler.is_compiling() or panels.requires_grad else native.in_huge_pages(panels)


def to_panels(config: MoEConfig, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Returns plain gate_up and down in panels, for any back-end."""
    return gate_up_to_panels(config, gate_up), down_to_panels(config, down)


def gate_up_to_panels(config: MoEConfig, gate_up: Tensor) -> Tensor:
    """Returns plain gate_up in panels."""
    return weight_to_panels(config, "gate_up", _out_in(config, gate_up))


def down_to_panels(config: MoEConfig, down: Tensor) -> Tensor:
    """Returns plain down in panels."""
    return weight_to_panels(config, "down", _out_in(config, down))


def restore_weights(config: MoEConfig, weights: MoEWeights) -> MoEWeights:
    """The inverse of prepare_weights, bit for bit; plain weights are returned unchanged."""
    check_layer("restore_weights", config, weights)
    _check("restore_weights", config.own, weights)
    return _restore_weights(config, weights)


def _restore_weights(config: MoEConfig, weights: MoEWeights) -> MoEWeights:
    if not is_prepared(weights.gate_up):
        return weights
    config = config.own
    per_byte = 1 if config.quant is None else config.quant.per_byte
    gate_up = weight_from_panels(config, "gate_up", weights.gate_up, config.expert_hidden_size // per_byte)
    down = weight_from_panels(config, "down", weights.down, config.intermediate_size // per_byte)
    quant = None if weights.quant is None else _quant_from_panels(config, weights.quant)
    return dataclasses.replace(
        weights, gate_up=_out_in(config, gate_up).contiguous(), down=_out_in(config, down).contiguous(), quant=quant
    )


def convert_experts(config: MoEConfig, weights: MoEWeights, dtype: torch.dtype) -> MoEWeights:
    """Converts gate_up and down to a dtype; prepared ones stay prepared. Codes are returned unchanged.

    Laws
        Converting prepared weights is preparing converted ones.
    """
    if config.quant is not None or (weights.gate_up.dtype == dtype and weights.down.dtype == dtype):
        return weights
    if not is_prepared(weights.gate_up):
        return dataclasses.replace(weights, gate_up=weights.gate_up.to(dtype), down=weights.down.to(dtype))
    if backend_of(config, weights.gate_up.new_empty(0, dtype=dtype)) != "native":
        return convert_experts(config, _restore_weights(config, weights), dtype)
    gate_up = convert_panels(weights.gate_up, dtype, config.expert_hidden_size)
    return dataclasses.replace(
        weights, gate_up=gate_up, down=convert_panels(weights.down, dtype, config.own.intermediate_size)
    )


def _quant_to_panels(config: MoEConfig, quant: QuantWeights) -> QuantWeights:
    """Returns scales and zero points in panels, one for each column."""
    tile = (None if config.quant is None else config.quant.tile[0]), 1

    def to_columns(name: str, values: Tensor) -> Tensor:
        outputs = config.expert_hidden_size if name == "down" else config.gate_up_size
        as_bytes = values.view(torch.uint8) if values.itemsize == 1 else values
        per_output = expand_tiles(as_bytes, tile, halves_of(config, name), outputs, values.shape[2])
        return columns_to_panels(config, name, per_output.contiguous().view(values.dtype))

    return _map_per_tile(quant, to_columns)


def _quant_from_panels(config: MoEConfig, quant: QuantWeights) -> QuantWeights:
    """The inverse of _quant_to_panels: returns the value of each tile's first column."""

    def to_tiles(name: str, values: Tensor) -> Tensor:
        columns = columns_from_panels(config, name, values)
        halves = halves_of(config, name)
        tile = None if config.quant is None else config.quant.tile[0]
        first: Tensor = columns.unflatten(1, (halves, -1))[:, :, :: tile or columns.shape[1] // halves]
        return first.flatten(1, 2).contiguous()

    return _map_per_tile(quant, to_tiles)


def _map_per_tile(quant: QuantWeights, change: Callable[[str, Tensor], Tensor]) -> QuantWeights:
    """Returns the record with `change(matrix name, tensor)` of its scales and zero points."""
    fields = {f"{name}_{kind}": (name, getattr(quant, f"{name}_{kind}")) for name in NAMES for kind in PER_TILE}
    return dataclasses.replace(
        quant, **{field: change(name, t) for field, (name, t) in fields.items() if t is not None}
    )


def _check(where: str, config: MoEConfig, weights: MoEWeights) -> None:
    plain = tuple(expected.sizes for expected in expected_weights(config)[:2])
    found = tuple(weights.gate_up.shape), tuple(weights.down.shape)
    if found != plain and found != prepared_shapes(config, weights.gate_up.dtype):
        raise ValueError(f"{where}: gate_up and down are {found[0]} and {found[1]}; expected {plain[0]} and {plain[1]}")


def _out_in(config: MoEConfig, weight: Tensor) -> Tensor:
    return weight if config.weight_layout == "out_in" else weight.transpose(1, 2)
