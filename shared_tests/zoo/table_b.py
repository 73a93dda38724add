"""Table B: top-k of the logits, then softmax (or sigmoid) over the chosen."""

from dataclasses import replace

from shared_tests.zoo.tables import MIXTRAL, ROW, family

_ROUTER = replace(ROW, router="router")
_SWIGLU = {"plain": {}, "limit-bites": {"swiglu_limit": 0.5}, "alpha": {"swiglu_alpha": 0.8, "swiglu_limit": 1.0}}
_ARIA = {"hidden_size": 32, "intermediate_size": 24, "moe_num_experts": 8, "moe_topk": 3}
_COHERE = {"hidden_size": 32, "intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}

ROWS_B = (
    *family("B", "gpt_oss", "GptOssConfig", "GptOssMLP", MIXTRAL, _SWIGLU, _ROUTER),
    *family(
        "B",
        "openai_privacy_filter",
        "OpenAIPrivacyFilterConfig",
        "OpenAIPrivacyFilterMLP",
        {**MIXTRAL, "num_experts_per_tok": 3},
        _SWIGLU,
        _ROUTER,
    ),
    *family(
        "B",
        "granitemoe",
        "GraniteMoeConfig",
        "GraniteMoeMoE",
        MIXTRAL,
        {"plain": {}, "gelu": {"hidden_act": "gelu"}},
        _ROUTER,
    ),
    *family(
        "B",
        "granitemoe_swa",
        "GraniteMoeSWAConfig",
        "GraniteMoeSWAMoE",
        {**MIXTRAL, "num_experts_per_tok": 3},
        {"plain": {}},
        _ROUTER,
    ),
    *family(
        "B",
        "granitemoeshared",
        "GraniteMoeSharedConfig",
        "GraniteMoeSharedMoE",
        {**MIXTRAL, "shared_intermediate_size": 20},
        {"plain": {}},
        _ROUTER,
    ),
    *family(
        "B",
        "granitemoehybrid",
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridMoE",
        {**MIXTRAL, "shared_intermediate_size": 20, "mamba_n_heads": 4},
        {"plain": {}},
        _ROUTER,
    ),
    *family(
        "B",
        "aria",
        "AriaTextConfig",
        "AriaTextMoELayer",
        _ARIA,
        {
            "plain": {},
            "mlp-bias": {"mlp_bias": True},
            "gelu-in-the-shared-alone": {"hidden_act": "gelu", "moe_num_shared_experts": 1},
        },
        _ROUTER,
    ),
    *family(
        "B",
        "cohere2_moe",
        "Cohere2MoeConfig",
        "Cohere2MoeSparseMoeBlock",
        _COHERE,
        {
            "softmax": {"num_shared_experts": 0},
            "softmax-sum": {"num_shared_experts": 2, "shared_expert_combination_strategy": "sum"},
            "softmax-average": {"num_shared_experts": 2, "shared_expert_combination_strategy": "average"},
            "sigmoid": {"expert_selection_fn": "sigmoid", "norm_topk_prob": False},
            "sigmoid-normalised": {"expert_selection_fn": "sigmoid", "norm_topk_prob": True},
            "sigmoid-sum": {
                "expert_selection_fn": "sigmoid",
                "norm_topk_prob": True,
                "num_shared_experts": 2,
                "shared_expert_combination_strategy": "sum",
            },
            "sigmoid-average": {
                "expert_selection_fn": "sigmoid",
                "norm_topk_prob": False,
                "num_shared_experts": 2,
                "shared_expert_combination_strategy": "average",
            },
        },
    ),
    *family(
        "B",
        "jetmoe",
        "JetMoeConfig",
        "JetMoeMoE",
        MIXTRAL,
        {"plain": {}, "gelu": {"activation_function": "gelu"}},
        replace(ROW, router="router", routing="jetmoe"),
    ),
    *family(
        "B",
        "jetmoe",
        "JetMoeConfig",
        "JetMoeMoA",
        {**MIXTRAL, "kv_channels": 8, "num_key_value_heads": 2},
        {"attention": {}},
        replace(
            ROW,
            router="router",
            routing="none",
            takes="attention",
            refused="a mixture of attention heads, not of feed-forward experts",
        ),
    ),
)
