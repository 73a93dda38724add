"""What may stand around the experts: shared and zero experts, a latent space, a norm."""

from dataclasses import dataclass
from typing import Literal

from moe_fn.checks import check_bool, check_choice, check_float, check_int
from moe_fn.config.activation import ActivationConfig, ActivationName, as_activation


@dataclass(frozen=True, kw_only=True)
class SharedExpertsConfig:
    """Experts that every token visits: one dense MLP, `count` experts of `intermediate_size` side by side.

    gate     "none"; "sigmoid": times sigmoid(x . weights.shared.gate), one number a token (Qwen2-MoE); "router": each
             shared expert is weighted by the router, which has `count` more logits, last, and whose scores share the
             renormalisation (Inkling)
    combine  routed + shared ("sum"), or half of it ("average", Cohere2-MoE)
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
        """Outputs of the shared gate_up for each place of intermediate_size: 2 with a gated activation, else 1."""
        return as_activation(self.activation).gate_up_parts


@dataclass(frozen=True, kw_only=True)
class ZeroExpertsConfig:
    """Experts that compute nothing: ids num_experts .. num_experts + count - 1 (LongCat-Flash, MoNE).

    kind  "identity" adds w * x, "zero" adds nothing, "constant" adds w * weights.constants[id - num_experts]
    """

    count: int
    kind: Literal["identity", "zero", "constant"] = "identity"

    def __post_init__(self) -> None:
        check_int("ZeroExpertsConfig.count", self.count, 1)
        check_choice("ZeroExpertsConfig.kind", self.kind, ("identity", "zero", "constant"))


def padding_experts(num_experts: int, top_k: int) -> ZeroExpertsConfig | None:
    """Choices that add nothing, where a token has more slots than a rank has experts: the other slots go to other
    ranks.

    >>> padding_experts(num_experts=2, top_k=3)
    ZeroExpertsConfig(count=1, kind='zero')
    """
    return ZeroExpertsConfig(count=top_k - num_experts, kind="zero") if top_k > num_experts else None


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """The routed experts work in a narrower space (Nemotron-H, Kimi-K3, Muse-Spark).

        v = norm(x @ weights.latent.input.T);  layer = norm(experts(v)) @ weights.latent.output.T

    Each norm is a root-mean-square norm over `size`, present where weights.latent.input_norm / .output_norm is.
    """

    size: int
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        check_int("LatentConfig.size", self.size, 1)
        check_float("LatentConfig.norm_epsilon", self.norm_epsilon, minimum=0.0)


@dataclass(frozen=True, kw_only=True)
class ExpertNormConfig:
    """Root-mean-square norm of each expert's output, before the routing weight (Muse-Spark).

    scale  weights.expert_norm [E, H] multiplies "after" the norm, or "before" it
    """

    epsilon: float = 1e-6
    scale: Literal["after", "before"] = "after"

    def __post_init__(self) -> None:
        check_float("ExpertNormConfig.epsilon", self.epsilon, minimum=0.0)
        check_choice("ExpertNormConfig.scale", self.scale, ("after", "before"))


@dataclass(frozen=True, kw_only=True)
class NormsConfig:
    """Root-mean-square norms around the layer: n(v) = v / sqrt(mean(v^2) + epsilon).

    input   the routed experts see n(x) * weights.input_norm (Gemma-4); shared and zero experts see x itself
    gate    the gate inside the layer sees n(x), without a scale of its own: fold one into weights.router.gate (Gemma-4)
    output  the layer is n(y) * weights.output_norm, of everything that is added up (A.X-K1, Gemma-4)
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
