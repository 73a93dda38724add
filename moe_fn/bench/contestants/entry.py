"""Record of a contestant (an implementation of a layer to time), and helpers that several contestants use."""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_fn.bench.problem import Problem, TokenInput
from moe_fn.config import MoEConfig, QuantConfig, as_activation
from moe_fn.config.activation import PRESETS
from moe_fn.records import MoEWeights, leaves_of_weights

Run = Callable[[], Tensor]
UNQUANTIZED = "moe_fn unquantized"  # moe_fn with decoded weights


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A contestant with its weights.

    bind    prepares an input, untimed, and returns the call that computes y [T, H]
    leaves  the tensors to differentiate, besides x
    rest_ms  how long its threads keep waiting actively after a call; the next contestant is called after that
    """

    bind: Callable[[TokenInput], Run]
    leaves: tuple[Tensor, ...] = ()
    rest_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One row.

    installed  the reason why it cannot run on this machine, or None
    refuses    the reason why it cannot compute this problem with this number of tokens, or None
    devices    device types that it supports
    build      makes the layer; errors are reported, and the other contestants go on
    takes      whether it takes part with float experts, with quantized ones, or with both
    copies     the number of extra copies of the weights in memory
    copies_of_floats  the number of copies of decoded weights
    package    the distribution that has it, which may depend on other versions of torch than the one here
    level      what it runs on this CPU: an instruction set, or a library that is compiled for one
    """

    name: str
    installed: Callable[[], str | None]
    refuses: Callable[[Problem, int], str | None]
    build: Callable[[Problem], Layer]
    takes: Literal["floats", "codes", "both"] = "floats"
    copies: int = 0
    copies_of_floats: int = 0
    ours: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    package: str | None = None
    level: Callable[[], str] | None = None


def takes_part(row: Contestant, quant: QuantConfig | None) -> bool:
    """Whether the contestant takes part with this quantization of experts."""
    return row.takes in ("both", "floats" if quant is None else "codes")


def always_installed() -> str | None:
    """`installed` of contestants that only need torch."""
    return None


def missing(*modules: str) -> str | None:
    """A reason with the packages that cannot be found, or None."""
    absent = [name for name in modules if not _is_there(name)]
    return f"not installed: {', '.join(absent)}" if absent else None


def _is_there(module: str) -> bool:
    """Whether a module can be found; imports the parent packages of a dotted name."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def version_of(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def activation_name(config: MoEConfig) -> str | None:
    """The preset name of the config's activation, or None."""
    activation = as_activation(config.activation)
    return next((name for name, preset in PRESETS.items() if preset == activation), None)


def refuses_weight_on_input(problem: Problem) -> str | None:
    """Reason of contestants that weight the experts' outputs, not inputs; None if it does not apply."""
    return "weights the experts' output only" if problem.config.router.weight_on == "input" else None


def only_on_cpu_forward(problem: Problem) -> str | None:
    """Reason of CPU libraries without gradients; None if it does not apply."""
    if problem.device.type != "cpu":
        return f"runs on cpu, not {problem.device.type}"
    return "has no gradients" if problem.backward else None


def trained_leaves(weights: MoEWeights, with_router: bool) -> tuple[Tensor, ...]:
    """The floating-point tensors that a training step differentiates."""
    of_router = () if weights.router is None else (weights.router.gate, weights.router.bias)
    leaves = [leaf for leaf in leaves_of_weights(weights) if leaf is not None]
    experts = [t for t in (weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias) if t is not None]
    routers = [t for t in leaves if any(t is other for other in of_router)]
    return tuple(experts + routers) if with_router else tuple(experts)


def out_in(config: MoEConfig, weight: Tensor) -> Tensor:
    """The weight as contiguous [E, out, in]; the same tensor if it has that layout already."""
    return weight.transpose(1, 2).contiguous() if config.weight_layout == "in_out" else weight


def interleaved(rows: Tensor) -> Tensor:
    """Rows [E, 2 I, ...] of all gates, then all ups -> gate, up, gate, up, ...

    >>> interleaved(torch.tensor([[0, 1, 10, 11]])).tolist()
    [[0, 10, 1, 11]]
    """
    gate, up = rows.chunk(2, dim=1)
    return torch.stack((gate, up), dim=2).flatten(1, 2)


def packed(rows: Tensor) -> Tensor:
    """The inverse of interleaved."""
    return torch.cat((rows[:, 0::2], rows[:, 1::2]), dim=1)


def rows_as_wanted(problem: Problem, rows: Tensor) -> Tensor:
    """gate_up [E, 2 I, ...] in the layout of these libraries: gates, then ups; interleaved for swigluoai."""
    wanted = "interleaved" if activation_name(problem.config) == "swigluoai" else "packed"
    if wanted == problem.config.gate_up_layout:
        return rows
    return interleaved(rows) if wanted == "interleaved" else packed(rows)
