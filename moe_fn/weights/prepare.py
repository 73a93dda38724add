"""Weights in the layout that the native kernels read in order: plain tensors in the same record, made once, by hand."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from moe_fn.backends import backend_of
from moe_fn.config import MoEConfig
from moe_fn.kernels.native import library as native
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
from moe_fn.weights.shapes import BESIDE, expected_weights, is_prepared, prepared_shapes

NAMES = ("gate_up", "down")


def prepare_weights(config: MoEConfig, weights: MoEWeights) -> MoEWeights:
    """The same weights, gate_up and down laid as the back-end that runs them reads them.

        gate_up [E, out, in], down [E, out, in]  ->  [E, panels, steps, 32 * d]:  panel of 32 outputs, step of d inputs

    with d = 1 for float32 and 2 for bfloat16 (32 bits), outputs and inputs padded with zeros; a panel of a gated
    gate_up holds 16 gates and their 16 ups. Codes of 8 and 4 bits are laid by their bytes, 4 of a column together;
    their scales and zero points become [E, panels, tiles of inputs, 32], one for each column. On other devices, dtypes
    and back-ends, nothing is to be done and the weights come back as they are. The result goes wherever weights go:
    compile, export, AOTInductor, `.to` another device, safetensors, gradients. Autocast takes weights that are prepared
    in its own dtype, and codes, as they are; others it converts in every call. It is for inference: plain weights are
    laid anew in every call. Prepare after loading, for the copy lies in huge pages, which a tensor read from a file
    does not: on a virtual machine that reads 10 to 20 % faster. Optimizers work on plain weights.

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
    if backend_of(config, computed) != "native" or is_prepared(weights.gate_up) or config.lora is not None:
        return weights  # adapters run by stages, which read plain weights
    quant = weights.quant
    if config.quant is not None:
        if (
            native.quant_problem(
                config.quant.json, config.expert_hidden_size, config.intermediate_size, computed.device.type
            )
            is not None
        ):
            return weights
        quant = None if quant is None else _quant_to_panels(config, quant)
    # one after the other: the copy that is laid goes before the next comes
    gate_up = _in_huge_pages(gate_up_to_panels(config, weights.gate_up))
    down = _in_huge_pages(down_to_panels(config, weights.down))
    return dataclasses.replace(weights, gate_up=gate_up, down=down, quant=quant)


def _in_huge_pages(laid: Tensor) -> Tensor:
    return laid if torch.compiler.is_compiling() or laid.requires_grad else native.in_huge_pages(laid)


def to_panels(config: MoEConfig, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Plain gate_up and down as panels, whatever the back-end."""
    return gate_up_to_panels(config, gate_up), down_to_panels(config, down)


def gate_up_to_panels(config: MoEConfig, gate_up: Tensor) -> Tensor:
    """Plain gate_up as panels."""
    return weight_to_panels(config, "gate_up", _out_in(config, gate_up))


def down_to_panels(config: MoEConfig, down: Tensor) -> Tensor:
    """Plain down as panels."""
    return weight_to_panels(config, "down", _out_in(config, down))


def restore_weights(config: MoEConfig, weights: MoEWeights) -> MoEWeights:
    """The plain weights that prepare_weights came from, bit for bit; plain weights come back as they are."""
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
    """gate_up and down in another dtype, prepared ones as prepare_weights would lay them; as they are in this dtype,
    and as codes.

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
    """Scales and zero points, one for each column of a panel."""
    tile = (None if config.quant is None else config.quant.tile[0]), 1

    def laid(name: str, values: Tensor) -> Tensor:
        outputs = config.expert_hidden_size if name == "down" else config.gate_up_size
        of_bytes = values.view(torch.uint8) if values.itemsize == 1 else values
        every = expand_tiles(of_bytes, tile, halves_of(config, name), outputs, values.shape[2])
        return columns_to_panels(config, name, every.contiguous().view(values.dtype))

    return _with_beside(quant, laid)


def _quant_from_panels(config: MoEConfig, quant: QuantWeights) -> QuantWeights:
    """The inverse: of each tile, what its first column has."""

    def lifted(name: str, values: Tensor) -> Tensor:
        columns = columns_from_panels(config, name, values)
        halves = halves_of(config, name)
        tile = None if config.quant is None else config.quant.tile[0]
        first: Tensor = columns.unflatten(1, (halves, -1))[:, :, :: tile or columns.shape[1] // halves]
        return first.flatten(1, 2).contiguous()

    return _with_beside(quant, lifted)


def _with_beside(quant: QuantWeights, change: Callable[[str, Tensor], Tensor]) -> QuantWeights:
    fields = {f"{name}_{what}": (name, getattr(quant, f"{name}_{what}")) for name in NAMES for what in BESIDE}
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
