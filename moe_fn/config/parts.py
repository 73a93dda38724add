"""Configs of shared experts, zero experts, the latent space and norms."""

from dataclasses import dataclass
from typing import Literal

from moe_fn.checks import check_bool, check_choice, check_float, check_int
from moe_fn.config.activation import ActivationConfig, ActivationName, as_activation


@dataclass(frozen=True, kw_only=True)
class SharedExpertsConfig:
    """Shared experts, applied to every token: one dense MLP of `count` concatenated experts of `intermediate_size`.

    gate     "none"; "sigmoid": times sigmoid(x . weights.shared.gate), one number per token (Qwen2-MoE); "router": the
             router weights each shared expert. It then has `count` more logits, last, which are renormalized together
             with the others (Inkling)
    combine  "sum": routed + shared; "average": half of it (Cohere2-MoE)
    """

    intermediate_size: int
    count: int = 1
    gate: Literal["none", "sigmoid", "router"] = "none"
    combine: Literal["sum", "average"] = "sum"
    activation: ActivationConfig | ActivationName = "silu"

    def __post_init__(self) -> None:
        check_int("SharedExpertsConfig.intermediate_size", self.intermediate_size, 1)
        check_int("SharedExpertsConfig.count", self.count, 1)
        check_choice("SharedExpertsConfig.gate", self.gate, ("none", "sigmoid", "router"))
        check_choice("SharedExpertsConfig.combine", self.combine, ("sum", "average"))
        as_activation(self.activation)

    @property
    def gate_up_parts(self) -> int:
        """Outputs of the shared gate_up per intermediate: 2 with a gated activation, else 1."""
        return as_activation(self.activation).gate_up_parts


@dataclass(frozen=True, kw_only=True)
class ZeroExpertsConfig:
    """Zero experts, which have no matrices: ids num_experts .. num_experts + count - 1 (LongCat-Flash, MoNE).

    kind  "identity" adds w * x, "zero" adds nothing, "constant" adds w * weights.constants[id - num_experts]
    """

    count: int
    kind: Literal["identity", "zero", "constant"] = "identity"

    def __post_init__(self) -> None:
        check_int("ZeroExpertsConfig.count", self.count, 1)
        check_choice("ZeroExpertsConfig.kind", self.kind, ("identity", "zero", "constant"))


def padding_experts(num_experts: int, top_k: int) -> ZeroExpertsConfig | None:
    """Returns zero experts that fill num_experts up to top_k, for a rank with fewer experts than a token has slots: the
    token's other slots are on other ranks.

    >>> padding_experts(num_experts=2, top_k=3)
    ZeroExpertsConfig(count=1, kind='zero')
    """
    return ZeroExpertsConfig(count=top_k - num_experts, kind="zero") if top_k > num_experts else None


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Latent space: the routed experts have a narrower input and output (Nemotron-H, Kimi-K3, Muse-Spark).

        v = norm(x @ weights.latent.input.T);  layer = norm(experts(v)) @ weights.latent.output.T

    Each norm is an RMS norm over `size`, applied if weights.latent.input_norm or .output_norm is given.
    """

    size: int
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        check_int("LatentConfig.size", self.size, 1)
        check_float("LatentConfig.norm_epsilon", self.norm_epsilon, minimum=0.0)


@dataclass(frozen=True, kw_only=True)
class ExpertNormConfig:
    """RMS norm of each expert's output, before the routing weight (Muse-Spark).

    scale  weights.expert_norm [E, Hx] multiplies "after" the norm, or "before" it
    """

    epsilon: float = 1e-6
    scale: Literal["after", "before"] = "after"

    def __post_init__(self) -> None:
        check_float("ExpertNormConfig.epsilon", self.epsilon, minimum=0.0)
        check_choice("ExpertNormConfig.scale", self.scale, ("after", "before"))


@dataclass(frozen=True, kw_only=True)
class NormsConfig:
    """RMS norms around the layer: n(v) = v / sqrt(mean(v^2) + epsilon).

    input   the input of the routed experts is n(x) * weights.input_norm (Gemma-4); shared and zero experts take x
    gate    the input of the gate is n(x), without a scale: fold a scale into weights.router.gate (Gemma-4)
    output  the output is n(y) * weights.output_norm, with y the sum of all experts (A.X-K1, Gemma-4)
    """

    epsilon: float = 1e-6
    input: bool = False
    gate: bool = False
    output: bool = False

    def __post_init__(self) -> None:
        check_float("NormsConfig.epsilon", self.epsilon, minimum=0.0)
        for name in ("input", "gate", "output"):
            check_bool(f"NormsConfig.{name}", getattr(self, name))
        if not (self.input or self.gate or self.output):
            raise ValueError("NormsConfig would have no effect: expected input, gate or output")
