"""Weight layouts of torchtitan's expert classes, one row each."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from moe_fn.config import MoEConfig
from moe_fn.config.activation import PRESETS, ActivationConfig


@dataclass(frozen=True, kw_only=True)
class ExpertsLayout:
    """Names of the parameters of one of torchtitan's classes, and the activation of its forward.

    gate_up         one name for [E, 2F, D] (or [E, F, 2, D], the same memory with gates and ups interleaved), or two
                    for [E, F, D]: gate, up
    down            name for [E, D, F]; the biases are [E, 2F] and [E, D]
    limit           attribute that holds the limit of the activation
    """

    class_name: str
    gate_up: tuple[str, ...]
    down: str
    gate_up_bias: str | None = None
    down_bias: str | None = None
    gate_up_layout: Literal["packed", "interleaved"] = "packed"
    activation: ActivationConfig = PRESETS["silu"]
    limit: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters of the class."""
        return tuple(name for name in (*self.gate_up, self.down, self.gate_up_bias, self.down_bias) if name is not None)


LAYOUTS = (
    ExpertsLayout(class_name="GroupedExperts", gate_up=("w1_EFD", "w3_EFD"), down="w2_EDF"),
    # torchtitan's overrides/fused_swiglu.py: one parameter in memory, w1 and w3 in checkpoints
    ExpertsLayout(class_name="FusedGroupedExperts", gate_up=("w13",), down="w2_EDF", gate_up_layout="interleaved"),
    ExpertsLayout(
        class_name="GptOssGroupedExperts",
        gate_up=("mlp1_weight_EGD",),
        down="mlp2_weight_EDF",
        gate_up_bias="mlp1_bias_EG",
        down_bias="mlp2_bias_ED",
        gate_up_layout="interleaved",
        activation=PRESETS["swigluoai"],
        limit="swiglu_limit",
    ),
)


def layout_of_class(base: type) -> ExpertsLayout | None:
    """The row of a class by its name; None for others, as subclasses like MXFP8GroupedExperts compute differently."""
    return next((layout for layout in LAYOUTS if layout.class_name == base.__name__), None)


def config_of_experts(layout: ExpertsLayout, experts: nn.Module, top_k: int = 1) -> MoEConfig:
    """The config of the experts, from the shapes of their parameters (global shapes for DTensors).

    Raises ValueError that names a parameter which is missing or has a wrong shape.
    """
    down: Any = getattr(experts, layout.down, None)
    if down is None or down.ndim != 3:
        raise ValueError(
            f"{type(experts).__name__}.{layout.down} is {_shape(down)}; expected (experts, dim, hidden_dim)"
        )
    num_experts, hidden_size, intermediate_size = down.shape
    for name in layout.gate_up:
        weight: Any = getattr(experts, name, None)
        wanted = num_experts * intermediate_size * hidden_size * (2 if len(layout.gate_up) == 1 else 1)
        if (
            weight is None
            or weight.shape[0] != num_experts
            or weight.shape[-1] != hidden_size
            or weight.numel() != wanted
        ):
            raise ValueError(
                f"{type(experts).__name__}.{name} is {_shape(weight)}; expected a shape that matches {layout.down}, "
                f"{_shape(down)}"
            )
    activation = (
        layout.activation
        if layout.limit is None
        else replace(layout.activation, limit=float(getattr(experts, layout.limit)))
    )
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        activation=activation,
        gate_up_layout=layout.gate_up_layout,
    )


def _shape(tensor: Any) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
