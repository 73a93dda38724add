"""Layers with the options that those of `ranks.cases` do not have, and reasons for options without a case."""

import dataclasses
from typing import Any

from options import OTHER, Option

from moe_fn import ActivationConfig, ActivationQuantConfig, MoEConfig, QuantConfig, RouterConfig, SharedExpertsConfig
from moe_fn.config import ExpertNormConfig, GroupConfig, LatentConfig, LoRAConfig, NormsConfig, ZeroExpertsConfig

BASE = MoEConfig(num_experts=6, top_k=2, hidden_size=8, intermediate_size=8)
WIDE = dataclasses.replace(BASE, hidden_size=64, intermediate_size=128)


def _quantized(
    scheme: Any, granularity: Any, rounded: tuple[Any, ...] | None = None, base: MoEConfig = BASE, **more: Any
) -> MoEConfig:
    """Returns a config with quantized weights, and inputs rounded by (scheme, granularity, further fields)."""
    activations = (
        None
        if rounded is None
        else ActivationQuantConfig(scheme=rounded[0], granularity=rounded[1], **dict(rounded[2:]))
    )
    return dataclasses.replace(
        base, quant=QuantConfig(scheme=scheme, granularity=granularity, activations=activations, **more)
    )


_TWO, _STATIC = ("group_size", 2), ("static", True)
MORE_LAYERS: dict[str, MoEConfig] = {
    "constants, groups of choices": dataclasses.replace(
        BASE,
        top_k=3,
        zero_experts=ZeroExpertsConfig(count=2, kind="constant"),
        router=RouterConfig(
            scoring="sigmoid",
            groups=GroupConfig(count=4, top_k=2, score="top2_sum", fill="zero"),
            renormalize_epsilon=0.25,
            renormalize_minimum=0.7,
            renormalize_order=2.0,
        ),
    ),
    "choices of each group, scores of the input's dtype": dataclasses.replace(
        BASE,
        backend="torch",
        router=RouterConfig(
            scoring="sqrtsoftplus",
            groups=GroupConfig(count=2, top_k=2, limit="each"),
            score_dtype="input",
            gate_dtype="input",
            logit_softcap=5.0,
        ),
    ),
    "lora whose experts share one side, sparsemixer": dataclasses.replace(
        BASE,
        lora=LoRAConfig(num_adapters=2, rank=3, experts="outer_shared"),
        zero_experts=ZeroExpertsConfig(count=1, kind="zero"),
        router=RouterConfig(selection="sparsemixer", renormalize=False, sparsemixer_epsilon=0.07),
    ),
    "shared experts of other parameters, a bias on logits": dataclasses.replace(
        BASE,
        activation=ActivationConfig(limit=0.5, alpha=1.7, up_offset=1.0),
        shared=SharedExpertsConfig(intermediate_size=8, activation="gelu_tanh_no_mul"),
        router=RouterConfig(
            scoring="identity",
            scoring_order="after_top_k",
            correction_bias="logits",
            logit_multiplier=0.5,
            renormalize=False,
            routed_scaling_factor=2.5,
            scale_on="output_float16_safe",
            gate_input="transformed",
        ),
        latent=LatentConfig(size=6, norm_epsilon=0.1),
    ),
    "norms of the output and for the gate, a capacity": dataclasses.replace(
        BASE, norms=NormsConfig(epsilon=0.1, output=True, gate=True), router=RouterConfig(capacity=2)
    ),
    "a norm of each expert": dataclasses.replace(BASE, expert_norm=ExpertNormConfig(epsilon=0.1)),
    "a norm of each expert, scaled before": dataclasses.replace(
        BASE, expert_norm=ExpertNormConfig(epsilon=0.1, scale="before"), norms=NormsConfig(epsilon=0.1, input=True)
    ),
    "int4 with zero points, static inputs": _quantized(
        "int4", "group", ("int8", "tensor", _STATIC), group_size=2, zero_points=True
    ),
    "fp8 in blocks, inputs in groups": _quantized(
        "fp8_e4m3", "block", ("fp8_e4m3", "group", _TWO, ("power_of_two_scales", True)), block_shape=(2, 1)
    ),
    "int8 of a tensor": _quantized("int8", "tensor", zero_points=True),
    "mxfp8": _quantized("mxfp8", "group", ("mxfp8", "group", ("group_size", 32)), WIDE, group_size=32),
    "mxfp4, inputs too": _quantized("mxfp4", "group", ("mxfp4", "group", ("group_size", 32)), WIDE, group_size=32),
    "nvfp4": _quantized("nvfp4", "group", ("nvfp4", "group", ("group_size", 16), _STATIC), WIDE, group_size=16),
    "int8, inputs of a token": _quantized("int8", "channel", ("int8", "token")),
}
# Not sliced: a norm needs the whole output of an expert, and a token's scale its whole width.
NOT_SLICED = ("a norm of each expert", "a norm of each expert, scaled before", "int8, inputs of a token")
NOT_BY_LOGITS = ("norms of the output and for the gate, a capacity",)  # a capacity counts a rank's own tokens
# Options that no case has, and the reason: a field (for all its values), or (field, value).
ELEMENTWISE = "elementwise, the same in every slice"
OF_OWN_EXPERTS = "concerns the experts of one rank, which are computed like a layer"
EXCUSED: dict[Option | str, str] = {
    "ActivationConfig.function": ELEMENTWISE,
    "ActivationConfig.limit_at": ELEMENTWISE,
    "ActivationConfig.gate_cap": ELEMENTWISE,
    "ActivationConfig.up_cap": ELEMENTWISE,
    "MoEConfig.activation": ELEMENTWISE,
    "SharedExpertsConfig.activation": ELEMENTWISE,
    "MoEConfig.backend": OF_OWN_EXPERTS,
    ("MoEConfig.recompute", True): OF_OWN_EXPERTS,
    ("RouterConfig.selection", "hash"): "computed before rows are sent, and refused where logits are sent",
    ("MoEConfig.chunk_tokens", OTHER): "refused: ranks must meet",
    ("MoEConfig.opaque", True): "refused: ranks must meet",
    ("MoEConfig.batch_invariant", True): "test_batch_invariance_ranks",
}
