"""Families whose router is a softmax: before the top-k (A), and after it (B)."""

from moe_fn.families.row import (
    ACT,
    ACTIVATIONS,
    NORM_TOP_K,
    OAI,
    PLAIN,
    SCALE,
    SHARED_BY_SIZE,
    SILU,
    WIDTH,
    WIDTH_OF_SHARED,
    Family,
    Shared,
)
from moe_fn.families.words import Given, word

_FLAG = {"renormalize": NORM_TOP_K, "gate_dtype": "input"}
_ALWAYS = {"renormalize": True, "gate_dtype": "input"}
_NEVER = {"renormalize": False, "gate_dtype": "input"}
_GATED = Shared(width=SHARED_BY_SIZE, gate="sigmoid")

_GROUP_COUNT = word(".num_group", "n_group", kind="whole")
_GROUP_TOP_K = word(".topk_group", "topk_group", kind="whole")

# DeepSeek-V2: groups where topk_method says so; norm_topk_prob is in its config and never read.
_V2 = {
    "renormalize": False,
    "routed_scaling_factor": SCALE,
    "groups": word(
        ".topk_method", "topk_method",
        values={
            "greedy": None,
            "group_limited_greedy": {
                "count": _GROUP_COUNT, "top_k": _GROUP_TOP_K, "score": "max", "fill": "zero",
            },
        },
    ),
}  # fmt: skip
_MISTRAL = {
    "renormalize_epsilon": 1e-20,
    "routed_scaling_factor": SCALE,
    "groups": {
        "count": _GROUP_COUNT, "top_k": _GROUP_TOP_K,
        "score": "top2_sum", "fill": "zero",
    },
}  # fmt: skip
_ERNIE = {"correction_bias": "scores", "renormalize_minimum": word(".norm_min", "moe_norm_min", kind="number")}
_DBRX_NORM = word(".moe_normalize_expert_weights", "moe_normalize_expert_weights", kind="number")
_GEMMA_EPSILON = word("rms_norm_eps", kind="number")

BEFORE_TOP_K: tuple[Family, ...] = (
    Family(("mixtral", "minimax"), ("MixtralSparseMoeBlock", "MiniMaxSparseMoeBlock"), _ALWAYS),
    Family(("qwen2_moe",), ("Qwen2MoeSparseMoeBlock",), _FLAG, shared=_GATED),
    Family(
        ("qwen3_moe", "mellum", "olmoe", "flex_olmo", "qwen3_omni_moe_text"),
        (
            "Qwen3MoeSparseMoeBlock",
            "MellumSparseMoeBlock",
            "OlmoeSparseMoeBlock",
            "FlexOlmoSparseMoeBlock",
            "Qwen3OmniMoeThinkerTextSparseMoeBlock",
        ),
        _FLAG,
    ),
    Family(("qwen3_vl_moe_text",), ("Qwen3VLMoeTextSparseMoeBlock",), _ALWAYS),
    Family(
        ("qwen3_next", "qwen4_exp_text", "qwen3_omni_moe_talker_text"),
        ("Qwen3NextSparseMoeBlock", "Qwen4ExpTextSparseMoeBlock", "Qwen3OmniMoeTalkerTextSparseMoeBlock"),
        _FLAG,
        shared=_GATED,
    ),
    Family(("qwen3_5_moe_text",), ("Qwen3_5MoeSparseMoeBlock",), _ALWAYS, shared=_GATED),
    Family(("jamba",), ("JambaSparseMoeBlock",), _NEVER),
    Family(
        ("hunyuan_v1_moe",),
        ("HunYuanMoEV1Moe",),
        {"renormalize": True},
        shared=Shared(width=WIDTH_OF_SHARED),
        intermediate_size=WIDTH,
    ),
    Family(("ernie4_5_moe",), ("Ernie4_5_MoeSparseMoeBlock",), _ERNIE, shared=Shared()),
    Family(("ernie4_5_vl_moe_bank",), ("Ernie4_5_VLMoeSparseMoeBlock",), _ERNIE),
    Family(
        ("ernie4_5_vl_moe_text",),
        ("Ernie4_5_VLMoeMoeBlock",),
        refused=(
            "two banks of experts, of different sizes, one for text and one for images: "
            "take its text_moe and its vision_moe"
        ),
    ),
    Family(
        ("gemma4_text", "diffusion_gemma_text"),
        ("Gemma4TextDecoderLayer", "DiffusionGemmaEncoderTextLayer", "DiffusionGemmaDecoderTextLayer"),
        _ALWAYS,
        layer={"norms": {"epsilon": _GEMMA_EPSILON, "input": True, "gate": True, "output": True}},
    ),
    Family(
        ("deepseek_v2", "deepseek_ocr2_text", "unlimited_ocr_text"),
        ("DeepseekV2Moe", "DeepseekOcr2TextMoe", "UnlimitedOcrTextMoe"),
        _V2,
        shared=Shared(),
    ),
    Family(
        ("mistral4",),
        ("Mistral4MoE",),
        _MISTRAL | {"renormalize": NORM_TOP_K, "gate_dtype": "input", "score_dtype": "input"},
        shared=Shared(),
    ),
    Family(("mistral_large4_text",), ("MistralLarge4TextMoE",), _MISTRAL, shared=Shared()),
    Family(
        ("longcat_flash",),
        ("LongcatFlashMoE",),
        {"correction_bias": "scores", "renormalize": False, "routed_scaling_factor": SCALE},
        layer={"zero_experts": {"count": word("zero_expert_num", kind="whole")}},
    ),
    Family(
        ("zaya",),
        ("ZayaSparseMoeBlock",),
        {"correction_bias": "scores", "renormalize": False},
        layer={"zero_experts": {"count": 1, "kind": "zero"}},  # the class that skips the experts
    ),
    Family(
        ("dbrx",),
        ("DbrxFFN",),
        {
            "renormalize": Given(_DBRX_NORM, True, False),
            "renormalize_order": Given(_DBRX_NORM, _DBRX_NORM, 1.0),
            "gate_dtype": "input",
            "score_dtype": "input",
        },
        activation={"act": word(".activation_fn", "ffn_act_fn", values=ACTIVATIONS)},
    ),
)

_AFTER = {"scoring_order": "after_top_k", "renormalize": False}

AFTER_TOP_K: tuple[Family, ...] = (
    Family(
        ("gpt_oss",),
        ("GptOssMLP",),
        _AFTER | {"gate_dtype": "input", "score_dtype": "input"},
        OAI,
        layer={"gate_up_layout": "interleaved", "weight_layout": "in_out"},
    ),
    # It divides weights by top_k and multiplies the output by it again.
    Family(("openai_privacy_filter",), ("OpenAIPrivacyFilterMLP",), _AFTER, OAI, layer={"weight_layout": "in_out"}),
    Family(
        ("granitemoe", "granitemoe_swa", "granitemoeshared", "granitemoehybrid"),
        ("GraniteMoeMoE", "GraniteMoeSWAMoE", "GraniteMoeSharedMoE", "GraniteMoeHybridMoE"),
        _AFTER | {"gate_dtype": "input"},
    ),
    Family(
        ("aria_text",),
        ("AriaTextMoELayer",),
        _AFTER | {"gate_dtype": "input", "score_dtype": "input"},
        SILU,
        shared=Shared(activation=PLAIN),
        layer={"weight_layout": "in_out"},
    ),
    Family(
        ("cohere2_moe",),
        ("Cohere2MoeSparseMoeBlock",),
        {
            "scoring": word(
                ".expert_selection_fn", "expert_selection_fn", values={"softmax": "softmax", "sigmoid": "sigmoid"}
            ),
            "scoring_order": "after_top_k",
            "renormalize": word(
                ".expert_selection_fn", "expert_selection_fn", values={"softmax": False, "sigmoid": NORM_TOP_K}
            ),
            "gate_dtype": "input",
        },
        shared=Shared(combine=word("shared_expert_combination_strategy", values={"average": "average", "sum": "sum"})),
        intermediate_size=WIDTH,
    ),
    Family(("jetmoe",), ("JetMoeMoE",), _AFTER | {"gate_dtype": "input"}, {"act": ACT}),
)
