"""Table A: softmax over all experts, then top-k."""

from dataclasses import replace

from shared_tests.zoo.tables import MIXTRAL, QWEN, QWEN_SHARED, ROW, family, twins, without

_GELU = {"hidden_act": "gelu_pytorch_tanh"}
_NORM_OR_NOT = {"not-normalised": {"norm_topk_prob": False}, "normalised": {"norm_topk_prob": True}}
_ROUTER = replace(ROW, router="router")

MIXTRALS = (
    *family(
        "A",
        "mixtral",
        "MixtralConfig",
        "MixtralSparseMoeBlock",
        MIXTRAL,
        {"plain": {}, "relu": {"hidden_act": "relu"}, "top-1": {"num_experts_per_tok": 1}},
    ),
    *family(
        "A",
        "minimax",
        "MiniMaxConfig",
        "MiniMaxSparseMoeBlock",
        {**MIXTRAL, "num_experts_per_tok": 3},
        {"plain": {}, "gelu": _GELU},
    ),
    *family(
        "A",
        "jamba",
        "JambaConfig",
        "JambaSparseMoeBlock",
        without({**QWEN, "intermediate_size": 24}, "moe_intermediate_size"),
        {"plain": {}},
        _ROUTER,
    ),
    *family("A", "olmoe", "OlmoeConfig", "OlmoeSparseMoeBlock", without(QWEN, "moe_intermediate_size"), _NORM_OR_NOT),
    *family(
        "A",
        "flex_olmo",
        "FlexOlmoConfig",
        "FlexOlmoSparseMoeBlock",
        without(QWEN, "moe_intermediate_size"),
        _NORM_OR_NOT,
    ),
)

QWENS = (
    *family("A", "qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeSparseMoeBlock", QWEN_SHARED, {**_NORM_OR_NOT, "gelu": _GELU}),
    *family("A", "qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock", QWEN, {**_NORM_OR_NOT, "gelu": _GELU}),
    *family("A", "qwen3_vl_moe", "Qwen3VLMoeTextConfig", "Qwen3VLMoeTextSparseMoeBlock", QWEN, {"plain": {}}),
    *family(
        "A", "qwen3_omni_moe", "Qwen3OmniMoeTextConfig", "Qwen3OmniMoeThinkerTextSparseMoeBlock", QWEN, _NORM_OR_NOT
    ),
    *family(
        "A",
        "qwen3_omni_moe",
        "Qwen3OmniMoeTalkerTextConfig",
        "Qwen3OmniMoeTalkerTextSparseMoeBlock",
        QWEN_SHARED,
        {f"talker-{name}": options for name, options in _NORM_OR_NOT.items()},
    ),
    *family("A", "mellum", "MellumConfig", "MellumSparseMoeBlock", QWEN, _NORM_OR_NOT),
    *family("A", "qwen3_next", "Qwen3NextConfig", "Qwen3NextSparseMoeBlock", QWEN_SHARED, _NORM_OR_NOT),
    *family(
        "A",
        "qwen3_5_moe",
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeSparseMoeBlock",
        without(QWEN_SHARED, "intermediate_size"),
        {"plain": {}, "relu": {"hidden_act": "relu"}},
    ),
    *family(
        "A",
        "qwen4_exp",
        "Qwen4ExpTextConfig",
        "Qwen4ExpTextSparseMoeBlock",
        without(QWEN_SHARED, "intermediate_size"),
        _NORM_OR_NOT,
    ),
)

_HUNYUAN = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
_ERNIE = {"hidden_size": 32, "moe_num_experts": 8, "moe_k": 3, "num_hidden_layers": 2, "intermediate_size": 40}
_ERNIE_VARIANTS = {
    "shared": {"moe_num_shared_experts": 2},
    "shared-with-bias": {"moe_num_shared_experts": 1, "use_bias": True},
    "no-shared": {"moe_num_shared_experts": 0},
    "norm-min-bites": {"moe_num_shared_experts": 0, "moe_norm_min": 0.7},
}
_ERNIE_VL = {**_ERNIE, "moe_intermediate_size": [24, 16]}
_BANK = replace(ROW, takes="flat_output")

HUNYUAN_ERNIE_LONGCAT = (
    *family(
        "A",
        "hunyuan_v1_moe",
        "HunYuanMoEV1Config",
        "HunYuanMoEV1Moe",
        _HUNYUAN,
        {"plain": {"num_experts": 8, "moe_topk": 3}},
        replace(ROW, args=(0,)),
    ),
    *family(
        "A",
        "hunyuan_v1_moe",
        "HunYuanMoEV1Config",
        "HunYuanMoEV1Moe",
        _HUNYUAN,
        {"per-layer-top-k": {"num_experts": 8, "moe_topk": [3, 2]}},
        replace(ROW, args=(1,)),
    ),
    *family(
        "A",
        "ernie4_5_moe",
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeSparseMoeBlock",
        {**_ERNIE, "moe_intermediate_size": 24},
        _ERNIE_VARIANTS,
    ),
    *family(
        "A",
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeTextConfig",
        "Ernie4_5_VLMoeMoeBlock",
        _ERNIE_VL,
        {"text-bank": {}},
        replace(_BANK, path="text_moe"),
    ),
    *family(
        "A",
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeTextConfig",
        "Ernie4_5_VLMoeMoeBlock",
        _ERNIE_VL,
        {"vision-bank": {"moe_norm_min": 0.7}},
        replace(_BANK, path="vision_moe"),
    ),
    *family(
        "A",
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeTextConfig",
        "Ernie4_5_VLMoeMoeBlock",
        _ERNIE_VL,
        {"two-banks-shared": {"moe_num_shared_experts": 2}, "two-banks": {"moe_num_shared_experts": 0}},
        replace(ROW, takes="modality", routing="two_banks", router="text_moe.gate vision_moe.gate"),
    ),
    *family(
        "A",
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeTextConfig",
        "Ernie4_5_VLMoeMoeBlock",
        _ERNIE_VL,
        {"all-text-shared": {"moe_num_shared_experts": 2}},
        replace(ROW, router="text_moe.gate", idle="vision_moe"),
    ),
    *twins(
        family(
            "A",
            "longcat_flash",
            "LongcatFlashConfig",
            "LongcatFlashMoE",
            {"hidden_size": 32, "expert_ffn_hidden_size": 24, "n_routed_experts": 8, "moe_topk": 3, "num_layers": 2},
            {
                "zero-experts": {"zero_expert_num": 4, "routed_scaling_factor": 2.5},
                "no-zero-experts": {"zero_expert_num": 0, "routed_scaling_factor": 6.0},
                "bias-that-is-never-applied": {"zero_expert_num": 4, "routed_scaling_factor": 2.5, "router_bias": True},
            },
            replace(_ROUTER, idle="router.classifier.bias"),
        ),
        {"bias-that-is-never-applied": "zero-experts"},
    ),
)

ROWS_A = (*MIXTRALS, *QWENS, *HUNYUAN_ERNIE_LONGCAT)
