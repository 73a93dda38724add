"""The memory layout of panels, for weights and for values per output (such as scales): invertible permutations.

A panel has 32 columns (outputs of a matrix); in a gated gate_up 16 gates, then the 16 ups that match.
"""

import torch
from torch import Tensor

from moe_fn.config import MoEConfig

PANEL = 32  # columns of a panel
STEP_BYTES = 4  # contiguous bytes of one column


def per_step_of(dtype: torch.dtype) -> int:
    """Returns the number of inputs in a step (of 4-bit codes: pairs): as many as fit into 32 bits, at least 1."""
    return max(STEP_BYTES // dtype.itemsize, 1)


def num_panels(config: MoEConfig, name: str) -> int:
    """Returns the number of panels of gate_up or of down."""
    if name == "down":
        return -(-config.expert_hidden_size // PANEL)
    return -(-config.intermediate_size // (PANEL // config.gate_up_parts))


def weight_to_panels(config: MoEConfig, name: str, weight: Tensor) -> Tensor:
    """Stores a weight in panels: [E, outputs, in] -> [E, panels, steps, 32 * d]. Packed codes stay packed."""
    per_step = per_step_of(weight.dtype)
    by_panel = _to_panels(config, name, _bytes(weight))
    steps: Tensor = _pad(by_panel, 2, per_step).unflatten(2, (-1, per_step)).unflatten(1, (-1, PANEL))
    return _view_as(weight.dtype, steps.transpose(2, 3).flatten(3).contiguous())


def weight_from_panels(config: MoEConfig, name: str, panels: Tensor, inputs: int) -> Tensor:
    """The inverse of weight_to_panels: [E, panels, steps, 32 * d] -> [E, outputs, inputs]; `inputs` counts elements."""
    columns: Tensor = _bytes(panels).unflatten(3, (PANEL, -1))
    columns = columns.transpose(2, 3).flatten(3).flatten(1, 2).narrow(2, 0, inputs)
    return _view_as(panels.dtype, _from_panels(config, name, columns).contiguous())


def convert_panels(panels: Tensor, dtype: torch.dtype, inputs: int) -> Tensor:
    """Converts panels [E, panels, steps, 32 * d] of floats to another dtype and its d: equals weight_to_panels of the
    plain weight in that dtype.
    """
    per_step = per_step_of(dtype)
    by_input = panels.unflatten(3, (PANEL, -1)).transpose(3, 4).flatten(2, 3).narrow(2, 0, inputs)
    steps: Tensor = _pad(by_input, 2, per_step).unflatten(2, (-1, per_step)).transpose(3, 4)
    return steps.to(dtype, memory_format=torch.contiguous_format).flatten(3)  # one pass


def columns_to_panels(config: MoEConfig, name: str, values: Tensor) -> Tensor:
    """Stores values per output in panels: [E, outputs, n] -> [E, panels, n, 32]."""
    by_panel: Tensor = _to_panels(config, name, _bytes(values)).unflatten(1, (-1, PANEL))
    return _view_as(values.dtype, by_panel.transpose(2, 3).contiguous())


def columns_from_panels(config: MoEConfig, name: str, panels: Tensor) -> Tensor:
    """The inverse of columns_to_panels: [E, panels, n, 32] -> [E, outputs, n]."""
    return _view_as(panels.dtype, _from_panels(config, name, _bytes(panels).transpose(2, 3).flatten(1, 2)).contiguous())


def _bytes(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.itemsize == 1 else t  # float8 lacks some of these ops


def _view_as(dtype: torch.dtype, t: Tensor) -> Tensor:
    """Returns t.view(dtype), or t if it has the dtype: view(dtype) has no gradient, even for the same dtype."""
    return t if t.dtype == dtype else t.view(dtype)


def _pad(weight: Tensor, dim: int, multiple: int) -> Tensor:
    missing = -weight.shape[dim] % multiple
    shape = list(weight.shape)
    shape[dim] = missing
    return torch.cat([weight, weight.new_zeros(shape)], dim) if missing else weight


def _to_panels(config: MoEConfig, name: str, weight: Tensor) -> Tensor:
    """Returns outputs in the order of the panels, padded with zeros to a multiple of the panel size."""
    if name == "down" or config.gate_up_parts == 1:
        return _pad(weight, 1, PANEL)
    gates_and_ups: Tensor = (
        weight.unflatten(1, (2, -1))
        if config.gate_up_layout == "packed"
        else weight.unflatten(1, (-1, 2)).transpose(1, 2)
    )
    by_panel: Tensor = _pad(gates_and_ups, 2, PANEL // 2).unflatten(2, (-1, PANEL // 2))
    return by_panel.transpose(1, 2).flatten(1, 3)


def _from_panels(config: MoEConfig, name: str, columns: Tensor) -> Tensor:
    """Returns outputs in the order of plain weights, without padding."""
    if name == "down":
        return columns.narrow(1, 0, config.expert_hidden_size)
    inner = config.intermediate_size
    if config.gate_up_parts == 1:
        return columns.narrow(1, 0, inner)
    gates_and_ups: Tensor = columns.unflatten(1, (-1, 2, PANEL // 2)).transpose(1, 2).flatten(2, 3).narrow(2, 0, inner)
    return (
        gates_and_ups.flatten(1, 2)
        if config.gate_up_layout == "packed"
        else gates_and_ups.transpose(1, 2).flatten(1, 2)
    )
