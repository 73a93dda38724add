"""Weights in the layout that the native kernels read in order: plain tensors in the same record, made once, by hand."""

import dataclasses

import torch
from torch import Tensor

from moe_fn.backends import backend_of
from moe_fn.config import MoEConfig, as_activation
from moe_fn.kernels import native
from moe_fn.records import MoEWeights

Shape = tuple[tuple[str, int], ...]  # name and size of each dim
PANEL = 32  # columns of a panel; a gated first product has 16 gates, then the 16 ups that match


def prepare_weights(config: MoEConfig, weights: MoEWeights) -> MoEWeights:
    """The same weights, gate_up and down laid as the back-end that runs them reads them.

        gate_up [E, out, in], down [E, out, in]  ->  [E, panels, steps, 32 * d]:  panel of 32 outputs, step of d inputs

    with d = 1 for float32 and 2 for bfloat16 (32 bits), outputs and inputs padded with zeros; a panel of a gated gate_up holds 16
    gates and their 16 ups. On other devices, dtypes and back-ends, nothing is to be done and the weights come back as they are.
    The result goes wherever weights go: compile, export, AOTInductor, `.to` another device, safetensors, gradients.
    It is for inference: plain weights are laid anew in every call. Prepare after loading, for the copy lies in huge pages, which a tensor
    read from a file does not: on a virtual machine that reads 10 to 20 % faster. Optimizers work on plain weights.

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
    config = config.own
    _check("prepare_weights", config, weights)
    if config.quant is not None:
        return weights
    if backend_of(config, weights.gate_up) != "native" or is_prepared(weights.gate_up) or config.lora is not None:
        return weights  # adapters run by stages, which read plain weights
    gate_up, down = lay_panels(config, weights.gate_up, weights.down)
    if not (torch.compiler.is_compiling() or gate_up.requires_grad or down.requires_grad):
        gate_up, down = native.in_huge_pages(gate_up), native.in_huge_pages(down)
    return dataclasses.replace(weights, gate_up=gate_up, down=down)


def lay_panels(config: MoEConfig, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Plain gate_up and down as panels, whatever the back-end."""
    return lay_gate_up(config, gate_up), lay_down(config, down)


def lay_gate_up(config: MoEConfig, gate_up: Tensor) -> Tensor:
    """Plain gate_up as panels."""
    return _panels(_by_panel(config, _out_in(config, gate_up)))


def lay_down(config: MoEConfig, down: Tensor) -> Tensor:
    """Plain down as panels."""
    return _panels(_pad(_out_in(config, down), 1, PANEL))


def restore_weights(config: MoEConfig, weights: MoEWeights) -> MoEWeights:
    """The plain weights that prepare_weights came from, bit for bit; plain weights come back as they are."""
    config = config.own
    _check("restore_weights", config, weights)
    if not is_prepared(weights.gate_up):
        return weights
    experts, inner, hidden = config.num_experts, config.intermediate_size, config.expert_hidden_size
    gate_up = _columns(weights.gate_up).narrow(-1, 0, hidden)
    if as_activation(config.activation).gated:
        gates_and_ups = gate_up.unflatten(1, (-1, 2, PANEL // 2)).transpose(1, 2).reshape(experts, 2, -1, hidden).narrow(2, 0, inner)
        gate_up = gates_and_ups.flatten(1, 2) if config.gate_up_layout == "packed" else gates_and_ups.transpose(1, 2).flatten(1, 2)
    else:
        gate_up = gate_up.narrow(1, 0, inner)
    down = _columns(weights.down).narrow(1, 0, hidden).narrow(2, 0, inner)
    return dataclasses.replace(weights, gate_up=_out_in(config, gate_up).contiguous(), down=_out_in(config, down).contiguous())


def is_prepared(weight: Tensor) -> bool:
    """Whether a gate_up or down is one that prepare_weights has laid."""
    return weight.ndim == 4


def plain_shapes(config: MoEConfig) -> tuple[Shape, Shape]:
    """Shapes of plain gate_up and down."""
    experts, hidden = ("num_experts", config.num_experts), ("expert_hidden_size", config.expert_hidden_size)
    inner = ("intermediate_size", config.intermediate_size)
    gate_up = ("2 * intermediate_size", 2 * config.intermediate_size) if as_activation(config.activation).gated else inner
    if config.weight_layout == "out_in":
        per_byte = 1 if config.quant is None else config.quant.per_byte
        of_hidden, of_inner = ((name if per_byte == 1 else f"{name} / {per_byte}", size // per_byte) for name, size in (hidden, inner))
        return (experts, gate_up, of_hidden), (experts, hidden, of_inner)
    return (experts, hidden, gate_up), (experts, inner, hidden)


def prepared_shapes(config: MoEConfig, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of prepared gate_up and down."""
    per_step = per_step_of(dtype)
    per_panel = PANEL // 2 if as_activation(config.activation).gated else PANEL

    def shape(columns: int, per_panel: int, inner: int) -> tuple[int, ...]:
        return config.num_experts, -(-columns // per_panel), -(-inner // per_step), PANEL * per_step

    hidden, inner = config.expert_hidden_size, config.intermediate_size
    return shape(inner, per_panel, hidden), shape(hidden, PANEL, inner)


def per_step_of(dtype: torch.dtype) -> int:
    """Inputs that lie together: as many as fit in 32 bits."""
    return max(4 // dtype.itemsize, 1)


def _check(where: str, config: MoEConfig, weights: MoEWeights) -> None:
    plain = tuple(tuple(size for _, size in shape) for shape in plain_shapes(config))
    found = tuple(weights.gate_up.shape), tuple(weights.down.shape)
    if found != plain and found != prepared_shapes(config, weights.gate_up.dtype):
        raise ValueError(f"{where}: gate_up and down are {found[0]} and {found[1]}; expected {plain[0]} and {plain[1]}")


def _out_in(config: MoEConfig, weight: Tensor) -> Tensor:
    return weight if config.weight_layout == "out_in" else weight.transpose(1, 2)


def _pad(weight: Tensor, dim: int, multiple: int) -> Tensor:
    missing = -weight.shape[dim] % multiple
    shape = list(weight.shape)
    shape[dim] = missing
    return torch.cat([weight, weight.new_zeros(shape)], dim) if missing else weight


def _by_panel(config: MoEConfig, gate_up: Tensor) -> Tensor:
    """Outputs in the order of the panels, padded to whole ones."""
    if not as_activation(config.activation).gated:
        return _pad(gate_up, 1, PANEL)
    gates_and_ups: Tensor = (
        gate_up.unflatten(1, (2, -1)) if config.gate_up_layout == "packed" else gate_up.unflatten(1, (-1, 2)).transpose(1, 2)
    )
    by_panel: Tensor = _pad(gates_and_ups, 2, PANEL // 2).unflatten(2, (-1, PANEL // 2))
    return by_panel.transpose(1, 2).flatten(1, 3)


def _panels(weight: Tensor) -> Tensor:
    """[E, panels * 32, in] -> [E, panels, steps, 32 * d]."""
    per_step = per_step_of(weight.dtype)
    steps: Tensor = _pad(weight, 2, per_step).unflatten(2, (-1, per_step)).unflatten(1, (-1, PANEL))
    return steps.transpose(2, 3).flatten(3).contiguous()


def _columns(panels: Tensor) -> Tensor:
    """The inverse of _panels, with its padding."""
    columns: Tensor = panels.unflatten(3, (PANEL, -1))
    return columns.transpose(2, 3).flatten(3).flatten(1, 2)
