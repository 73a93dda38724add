"""Config of the activation: its parameters, and presets with published names."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from moe_fn.checks import check_bool, check_choice, check_float

GateFunction = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "situ"]
ActivationName = Literal[
    "silu", "gelu", "gelu_tanh", "relu", "relu2", "swigluoai", "swiglustep",
    "silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul", "relu_no_mul", "relu2_no_mul",
]  # fmt: skip

# The functions, and which parameters of ActivationConfig each reads; a new one is a line.
FUNCTIONS: dict[GateFunction, tuple[str, ...]] = {
    "silu": ("alpha",),
    "gelu": (),
    "gelu_tanh": (),
    "relu": (),
    "relu2": (),
    "situ": ("gate_cap",),
}


@dataclass(frozen=True, kw_only=True)
class ActivationConfig:
    """Parameters of the experts' activation, `moe_fn.stages._activation.activate`.

        g' = min(g, limit), u' = clamp(u, -limit, limit)     limit_at="input"; "output": min(f(g), limit)
        gated:      f(g') * (u' + up_offset)                 with u' = up_cap * tanh(u' / up_cap) if up_cap
        not gated:  f(h)

    function  silu: g * sigmoid(alpha * g);  gelu: exact;  gelu_tanh: tanh form;  relu;  relu2: max(g, 0)^2;
              situ: gate_cap * tanh(g / gate_cap) * sigmoid(g)  (Kimi-K3; needs gate_cap)
    """

    function: GateFunction = "silu"
    gated: bool = True
    limit: float | None = None
    limit_at: Literal["input", "output"] = "input"
    alpha: float = 1.0
    up_offset: float = 0.0
    gate_cap: float | None = None
    up_cap: float | None = None

    def __post_init__(self) -> None:
        check_choice("ActivationConfig.function", self.function, tuple(FUNCTIONS))
        check_bool("ActivationConfig.gated", self.gated)
        check_choice("ActivationConfig.limit_at", self.limit_at, ("input", "output"))
        check_float("ActivationConfig.alpha", self.alpha)
        check_float("ActivationConfig.up_offset", self.up_offset)
        for name in ("limit", "gate_cap", "up_cap"):
            if getattr(self, name) is not None:
                check_float(f"ActivationConfig.{name}", getattr(self, name), above=0.0)
        if self.limit is None and self.limit_at == "output":
            raise ValueError("ActivationConfig.limit_at='output' would have no effect: expected a limit")
        if self.alpha != 1.0 and "alpha" not in FUNCTIONS[self.function]:
            raise ValueError(
                f"ActivationConfig.alpha={self.alpha} would have no effect: expected function='silu', got "
                f"{self.function!r}"
            )
        if (self.gate_cap is None) == ("gate_cap" in FUNCTIONS[self.function]):
            raise ValueError(
                f"ActivationConfig.gate_cap={self.gate_cap} with function={self.function!r}: "
                "expected it with 'situ', and only there"
            )
        if not self.gated and (self.up_offset != 0.0 or self.up_cap is not None or self.limit is not None):
            raise ValueError(
                "ActivationConfig.up_offset, up_cap and limit belong to gated activations: expected gated=True"
            )

        # Not a field: what an op takes at every launch, made once (0.3 us).
        object.__setattr__(self, "_values", tuple(getattr(self, field.name) for field in dataclasses.fields(self)))

    @property
    def values(self) -> tuple[Any, ...]:
        """The parameters, in the order of the fields, as ops take them."""
        return self._values  # type: ignore[attr-defined, no-any-return]

    @property
    def gate_up_parts(self) -> int:
        """Outputs of gate_up per intermediate: 2 (gate and up) for a gated activation, else 1."""
        return 2 if self.gated else 1


# Presets by their published names; a new preset is one row.
PRESETS: dict[str, ActivationConfig] = {
    "silu": ActivationConfig(),
    "gelu": ActivationConfig(function="gelu"),
    "gelu_tanh": ActivationConfig(function="gelu_tanh"),
    "relu": ActivationConfig(function="relu"),
    "relu2": ActivationConfig(function="relu2"),
    "swigluoai": ActivationConfig(limit=7.0, alpha=1.702, up_offset=1.0),  # gpt-oss
    "swiglustep": ActivationConfig(limit=7.0, limit_at="output"),  # Step-3.5
    "silu_no_mul": ActivationConfig(gated=False),
    "gelu_no_mul": ActivationConfig(function="gelu", gated=False),
    "gelu_tanh_no_mul": ActivationConfig(function="gelu_tanh", gated=False),
    "relu_no_mul": ActivationConfig(function="relu", gated=False),
    "relu2_no_mul": ActivationConfig(function="relu2", gated=False),  # Nemotron-H
}


def as_activation(activation: ActivationConfig | ActivationName) -> ActivationConfig:
    """Returns the preset with this name; a config is returned unchanged."""
    if isinstance(activation, ActivationConfig):
        return activation
    check_choice("activation", activation, tuple(PRESETS))
    return PRESETS[activation]
