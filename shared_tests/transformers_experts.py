"""Experts modules of transformers, tiny and random: every class with its decorator, and classes as users write them."""

import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from transformers.activations import ACT2FN  # noqa: E402
from transformers.integrations.moe import use_experts_implementation  # noqa: E402


def settings_of_experts(**changes: Any) -> SimpleNamespace:
    """Returns a config with every key that an experts class reads."""
    keys = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 6)
    keys |= dict.fromkeys(("hidden_size", "moe_hidden_size"), 16)
    keys |= dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 12)
    acts = dict.fromkeys(("hidden_act", "hidden_activation"), "silu") | {"mlp_hidden_act": "relu2"}
    numbers = {
        "swiglu_limit": 0.7,
        "swiglu_alpha": 1.3,
        "mlp_gate_softcap": 0.9,
        "mlp_up_softcap": 1.1,
        "post_norm_eps": 1e-5,
    }
    return SimpleNamespace(
        **(keys | acts | numbers | {"moe_latent_size": None, "_experts_implementation": "eager"} | changes)
    )


def decorated() -> dict[str, tuple[Path, str]]:
    """Returns (file, class name) of every class in transformers.models with `use_experts_implementation`."""
    root = Path(transformers.__file__).parent / "models"
    found = {}
    for path in sorted(root.glob("*/modeling_*.py")):
        for name in re.findall(r"^@use_experts_implementation.*\nclass (\w+)", path.read_text(), re.MULTILINE):
            found[name] = path, name
    return found


CLASSES = decorated()


def module_of(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    path, _ = CLASSES[name]
    module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
    return randomised(getattr(module, name)(settings_of_experts(**changes)), dtype)


def randomised(module: Any, dtype: torch.dtype, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        fan_in = parameter.shape[-2 if module.is_transposed else -1] if parameter.ndim == 3 else 1
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / math.sqrt(fan_in)
        parameter.data = (values.abs() + 0.5 if "norm" in name else values).to(dtype)
    return module


@dataclass(frozen=True)
class Tokens:
    """The inputs of experts: x [T, H], expert ids and weights [T, k]."""

    x: Tensor
    ids: Tensor
    w: Tensor


def tokens_of(
    module: Any,
    tokens: int = 9,
    top_k: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    strangers: tuple[int, ...] = (),
) -> Tokens:
    """Returns inputs with distinct experts for each token; about a third of the ids are replaced by `strangers`, ids of
    no expert, if any are given.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = module.down_proj
    hidden, experts = weight.shape[2 if module.is_transposed else 1], module.num_experts
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)
    order = torch.rand(tokens, max(top_k, experts), generator=generator).argsort(-1)[:, :top_k] % experts
    w = (torch.rand(tokens, top_k, generator=generator, dtype=torch.float64) + 0.1).to(dtype)
    if strangers:
        choice = torch.tensor(strangers)[torch.randint(len(strangers), order.shape, generator=generator)]
        order = torch.where(torch.rand(order.shape, generator=generator) < 0.3, choice, order)
    return Tokens(x, order, w)


def _gate_of_power(self: Any, gate_up: Tensor) -> Tensor:
    """A gate that moe_fn does not have: learned, with infinite derivatives at 0."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (gate * self.slope).abs().sqrt() * up


def _gate_own(self: Any, gate_up: Tensor) -> Tensor:
    """A gate that moe_fn does not have: learned, and not 0 at 0."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.tanh(gate) * up * self.slope.to(gate.dtype) + 0.2


def _gate_of_deepseek(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)  # the lines of DeepSeek-V4
    gate = gate.clamp(max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    return self.act_fn(gate) * up


def gate_nearly_of_deepseek(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=self.limit)
    up = up.clamp(min=-self.limit, max=2 * self.limit)
    return self.act_fn(gate) * up


class _Norm(nn.Module):
    """A norm. Without epsilon, a row of zeros has no finite output and gradient."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt() * self.weight


GATES: dict[str, Callable[..., Any] | None] = {
    "default": None,
    "own": _gate_own,
    "power": _gate_of_power,
    "deepseek": _gate_of_deepseek,
    "nearly": gate_nearly_of_deepseek,
}
NAMED_ACTS = (
    "silu", "swish", "quick_gelu", "gelu", "gelu_python", "gelu_pytorch_tanh", "gelu_new", "gelu_accurate", "gelu_fast",
    "relu", "relu2",
    "mish", "leaky_relu", "prelu",
)  # fmt: skip
ACTS: dict[str, Callable[[], Any]] = {
    **{name: partial(ACT2FN.__getitem__, name) for name in NAMED_ACTS},
    "F.silu": lambda: F.silu,
    "F.gelu": lambda: F.gelu,
    "lambda": lambda: lambda x: x * x.sigmoid() + 0.1,
    "partial": lambda: partial(F.gelu, approximate="tanh"),
}


def own_class(
    gate: str, act: str, *, has_bias: bool, is_transposed: bool, has_gate: bool, norm: bool, epsilon: float = 0.1
) -> type[nn.Module]:
    """Returns a class of experts as users write them, with the eager loop of transformers' docstring."""

    class Own(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
            wide = 2 * inner if has_gate else inner
            shapes = {"gate_up_proj" if has_gate else "up_proj": (wide, hidden), "down_proj": (hidden, inner)}
            for name, (rows, columns) in shapes.items():
                shape = (columns, rows) if is_transposed else (rows, columns)
                setattr(self, name, nn.Parameter(torch.empty(self.num_experts, *shape)))
                if has_bias:
                    setattr(self, f"{name}_bias", nn.Parameter(torch.empty(self.num_experts, rows)))
            self.act_fn, self.limit = ACTS[act](), 0.8
            self.slope = nn.Parameter(torch.tensor(1.5))
            if norm:
                self.post_expert_norm = _Norm(hidden, epsilon)

        def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
            y = torch.zeros_like(x)

            def product(rows: Tensor, name: str, e: int) -> Tensor:
                weight = getattr(self, name)[e]
                out = rows @ (weight if is_transposed else weight.t())
                return out + getattr(self, f"{name}_bias")[e] if has_bias else out

            for e in range(self.num_experts):
                token, slot = torch.where(ids == e)
                h = product(x[token], "gate_up_proj" if has_gate else "up_proj", e)
                h = product(self._apply_gate(h) if has_gate else self.act_fn(h), "down_proj", e)
                h = self.post_expert_norm(h) if norm else h
                y = y.index_add(0, token, (h * w[token, slot, None]).to(y.dtype))
            return y

    if GATES[gate] is not None:
        Own._apply_gate = GATES[gate]  # type: ignore[attr-defined]
    return use_experts_implementation(
        Own, is_transposed=is_transposed, has_bias=has_bias, has_gate=has_gate, has_post_expert_norm=norm
    )  # type: ignore[no-any-return]
