"""What a row of the table of contestants is, and what several rows need."""

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
UNQUANTIZED = "moe_fn unquantized"  # our own time with the floats that codes stand for


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A contestant that has its weights. bind makes an input ready, untimed; calling what it returns gives y [T, H].

    leaves: the tensors to differentiate, beside x.
    """

    bind: Callable[[TokenInput], Run]
    leaves: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One row.

    installed  why it cannot run here at all, or None
    refuses    why it cannot do this problem with so many tokens, or None
    devices    where it is offered
    build      the layer; what it raises is reported, and the others go on
    takes      whether it takes part where experts are floats, where they are codes, or in both
    copies     how many more times the weights it holds in memory, and copies_of_floats, how many times what codes stand
               for
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


def takes_part(row: Contestant, quant: QuantConfig | None) -> bool:
    """Whether it is asked at all, for experts quantized so."""
    return row.takes in ("both", "floats" if quant is None else "codes")


def always_installed() -> str | None:
    """For what needs nothing but torch."""
    return None


def missing(*modules: str) -> str | None:
    """Which of these packages cannot be found, as a reason."""
    absent = [name for name in modules if not _is_there(name)]
    return f"not installed: {', '.join(absent)}" if absent else None


def _is_there(module: str) -> bool:
    """Whether it could be imported; of a dotted name the packages before the dot are."""
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
    """The published name of the config's activation, or None if it has none."""
    activation = as_activation(config.activation)
    return next((name for name, preset in PRESETS.items() if preset == activation), None)


def refuses_weight_on_input(problem: Problem) -> str | None:
    """For those who weigh what experts give, not what they get."""
    return "weighs the experts' output only" if problem.config.router.weight_on == "input" else None


def only_on_cpu_forward(problem: Problem) -> str | None:
    """For ops of a CPU library without gradients."""
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
    """The weight as [E, out, in], contiguous; the same tensor if it is so already."""
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
    """gate_up [E, 2 I, ...] as these libraries want it: gates, then ups; for swigluoai alternating."""
    wanted = "interleaved" if activation_name(problem.config) == "swigluoai" else "packed"
    if wanted == problem.config.gate_up_layout:
        return rows
    return interleaved(rows) if wanted == "interleaved" else packed(rows)
