"""Shapes of published MoE layers: routed experts and router, without shared experts (which are a dense MLP)."""

from dataclasses import dataclass

from moe_fn.config import ActivationName, GroupConfig, MoEConfig, RouterConfig


@dataclass(frozen=True, kw_only=True)
class Model:
    """A named layer; biases: whether gate_up, down and the router have biases."""

    name: str
    config: MoEConfig
    biases: bool = False


def model_of_shape(text: str) -> Model:
    """The model of "E,k,H,I": experts, top_k, hidden_size, intermediate_size; softmax routing and silu.

    >>> model_of_shape("8,2,64,32").config.intermediate_size
    32
    """
    try:
        experts, top_k, hidden, inner = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--shape {text}: expected four integers E,k,H,I (experts, top_k, hidden_size, intermediate_size), as in "
            "128,8,2048,768"
        ) from None
    return _model(f"E{experts}-k{top_k}-H{hidden}-I{inner}", experts, top_k, hidden, inner)


def model_of_name(name: str) -> Model:
    """The model with that name in MODELS."""
    for model in MODELS:
        if model.name == name:
            return model
    raise ValueError(f"--model {name}: expected some of {', '.join(model.name for model in MODELS)}")


def matrices(config: MoEConfig) -> int:
    """The number of H x I matrices of an expert: 3 for gate, up and down, or 2 for up and down."""
    return config.gate_up_parts + 1


# The gate computes in the dtype of x, as in transformers for these families.
_SOFTMAX = RouterConfig(gate_dtype="input")
_SOFTMAX_AS_IT_IS = RouterConfig(gate_dtype="input", renormalize=False)
_TOP_K_THEN_SOFTMAX = RouterConfig(gate_dtype="input", scoring_order="after_top_k")


def _sigmoid(scale: float = 1.0, groups: GroupConfig | None = None) -> RouterConfig:
    return RouterConfig(scoring="sigmoid", correction_bias="scores", groups=groups, routed_scaling_factor=scale)


def _model(
    name: str,
    experts: int,
    top_k: int,
    hidden: int,
    inner: int,
    router: RouterConfig = _SOFTMAX,
    activation: ActivationName = "silu",
) -> Model:
    config = MoEConfig(
        num_experts=experts, top_k=top_k, hidden_size=hidden, intermediate_size=inner, router=router,
        activation=activation
    )  # fmt: skip
    return Model(name=name, config=config)


def _gpt_oss(name: str, experts: int, width: int) -> Model:
    config = MoEConfig(
        num_experts=experts,
        top_k=4,
        hidden_size=width,
        intermediate_size=width,
        router=_TOP_K_THEN_SOFTMAX,
        activation="swigluoai",
        gate_up_layout="interleaved",
        weight_layout="in_out",
    )
    return Model(name=name, config=config, biases=True)


_DEEPSEEK_V2 = RouterConfig(
    renormalize=False, routed_scaling_factor=16.0, groups=GroupConfig(count=8, top_k=3, fill="zero")
)
_DEEPSEEK_V3 = _sigmoid(2.5, GroupConfig(count=8, top_k=4, score="top2_sum"))
_DEEPSEEK_V4 = RouterConfig(scoring="sqrtsoftplus", correction_bias="scores", routed_scaling_factor=1.5)
_ERNIE = RouterConfig(correction_bias="scores")
_LLAMA_4 = RouterConfig(
    gate_dtype="input", scoring="sigmoid", scoring_order="after_top_k", renormalize=False, weight_on="input"
)
_PHI = RouterConfig(gate_dtype="input", selection="sparsemixer", renormalize=False)

# name, experts, top_k, hidden_size, intermediate_size, router, activation: as published in the models' configs.
MODELS: tuple[Model, ...] = (
    _model("mixtral-8x7b", 8, 2, 4096, 14336),
    _model("mixtral-8x22b", 8, 2, 6144, 16384),
    _model("mixtral-half", 8, 2, 2048, 7168),  # not published: half as wide, for machines with little memory
    _model("qwen1.5-moe-a2.7b", 60, 4, 2048, 1408, _SOFTMAX_AS_IT_IS),
    _model("qwen2-57b-a14b", 64, 8, 3584, 2560, _SOFTMAX_AS_IT_IS),
    _model("qwen3-30b-a3b", 128, 8, 2048, 768),
    _model("qwen3-235b-a22b", 128, 8, 4096, 1536),
    _model("qwen3-next-80b-a3b", 512, 10, 2048, 512),
    _model("qwen3.5-35b-a3b", 256, 8, 2048, 512),
    _model("olmoe", 64, 8, 2048, 1024, _SOFTMAX_AS_IT_IS),
    _model("deepseek-v2-lite", 64, 6, 2048, 1408, _SOFTMAX_AS_IT_IS),
    _model("deepseek-v2", 160, 6, 5120, 1536, _DEEPSEEK_V2),
    _model("deepseek-v3", 256, 8, 7168, 2048, _DEEPSEEK_V3),
    # One of 8 machines: 32 of the experts, each with as many rows as on that machine for 8 times the tokens.
    _model("deepseek-v3-32", 32, 8, 7168, 2048, _DEEPSEEK_V3),
    _model("deepseek-v4-flash", 256, 6, 4096, 2048, _DEEPSEEK_V4),
    _model("kimi-k2", 384, 8, 7168, 2048, _sigmoid(2.827)),
    _model("kimi-linear-48b-a3b", 256, 8, 2304, 1024, _sigmoid(2.446)),
    _model("glm-4.5-air", 128, 8, 4096, 1408, _sigmoid()),
    _model("glm-4.5", 160, 8, 5120, 1536, _sigmoid(2.5)),
    _model("minimax-m2", 256, 8, 3072, 1536, _sigmoid()),
    _model("llama4-scout", 16, 1, 5120, 8192, _LLAMA_4),
    _gpt_oss("gpt-oss-20b", 32, 2880),
    _gpt_oss("gpt-oss-120b", 128, 2880),
    _gpt_oss("gpt-oss-1440", 32, 1440),  # not published: half as wide
    _model("granite-3b-a800m", 40, 8, 1536, 512, _TOP_K_THEN_SOFTMAX),
    _model("phi-3.5-moe", 16, 2, 4096, 6400, _PHI),
    _model("nemotron-3-nano", 128, 6, 2688, 1856, _sigmoid(2.5), "relu2_no_mul"),
    _model("ernie-4.5-21b-a3b", 64, 6, 2560, 1536, _ERNIE),
    _model("hunyuan-a13b", 64, 8, 4096, 3072),
    _model("jamba-mini", 16, 2, 4096, 14336, _SOFTMAX_AS_IT_IS),
    _model("dbrx", 16, 4, 6144, 10752),
    _model("lfm2-8b-a1b", 32, 4, 2048, 1792, _sigmoid()),
    _model("grok-1", 8, 2, 6144, 32768, _SOFTMAX, "gelu"),
    _model("aria", 64, 6, 2560, 1664, _TOP_K_THEN_SOFTMAX),
)
