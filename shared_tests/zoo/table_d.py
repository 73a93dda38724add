"""Table D: sigmoid scores without groups."""

from dataclasses import replace

from shared_tests.zoo.tables import DEEPSEEK, MIXTRAL, QWEN, QWEN_SHARED, ROW, family, twins, without

_ROUTER = replace(ROW, router="router")
_M3 = {**MIXTRAL, "num_experts_per_tok": 3, "dense_intermediate_size": 40, "shared_intermediate_size": 20}
_STEP = {**without(DEEPSEEK, "n_shared_experts"), "share_expert_dim": 20}
_AFMOE = {**QWEN, "num_shared_experts": 2}
_LAGUNA = {**QWEN_SHARED, "num_hidden_layers": 2}
_MUSE = {
    "hidden_size": 32,
    "moe_hidden_size": 16,
    "moe_intermediate_size": 24,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_INKLING = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
}

ROWS_D = (
    *family(
        "D",
        "minimax_m2",
        "MiniMaxM2Config",
        "MiniMaxM2SparseMoeBlock",
        MIXTRAL,
        {"plain": {}, "gelu": {"hidden_act": "gelu"}},
    ),
    *family(
        "D",
        "minimax_m3_vl",
        "MiniMaxM3VLTextConfig",
        "MiniMaxM3VLSparseMoeBlock",
        _M3,
        {
            "plain": {"routed_scaling_factor": 1.0},
            "scaled": {"routed_scaling_factor": 2.0},
            "limit-bites": {"swiglu_limit": 0.5, "swiglu_alpha": 1.0},
        },
    ),
    *family(
        "D",
        "step3p7",
        "Step3p7TextConfig",
        "Step3p7SparseMoeBlock",
        _STEP,
        {
            "plain": {},
            "scaled": {"moe_router_scaling_factor": 2.5},
            "limits-of-the-layer": {"swiglu_limits": [7.0, 0.3], "swiglu_limits_shared": [7.0, 0.2]},
            "limit-of-the-routed-alone": {"swiglu_limits": [0.0, 0.3], "swiglu_limits_shared": [0.1, 0.0]},
            "shared-with-bias": {"mlp_bias": True},
        },
        replace(ROW, args=(1,)),
    ),
    *family(
        "D",
        "laguna",
        "LagunaConfig",
        "LagunaSparseMoeBlock",
        _LAGUNA,
        {
            "plain": {},
            "scaled": {"moe_routed_scaling_factor": 2.5},
            "softcap": {"moe_router_logit_softcapping": 1.5, "moe_routed_scaling_factor": 2.5},
        },
    ),
    *family(
        "D",
        "afmoe",
        "AfmoeConfig",
        "AfmoeSparseMoeBlock",
        _AFMOE,
        {"plain": {}, "scaled": {"route_scale": 2.5}},
        _ROUTER,
    ),
    *twins(
        family(
            "D",
            "hy_v3",
            "HYV3Config",
            "HYV3MoE",
            {**_AFMOE, "num_hidden_layers": 2},
            {
                "plain": {"enable_moe_fp32_combine": True, "router_scaling_factor": 1.0},
                "scaled": {"enable_moe_fp32_combine": True, "router_scaling_factor": 2.826},
                "scaled-combined-in-x-dtype": {"enable_moe_fp32_combine": False, "router_scaling_factor": 2.826},
            },
        ),
        {"scaled-combined-in-x-dtype": "scaled"},
    ),
    *family(
        "D",
        "flint",
        "FlintConfig",
        "FlintSparseMoeBlock",
        QWEN_SHARED,
        {"normalised": {}, "not-normalised": {"norm_topk_prob": False}},
    ),
    *family(
        "D",
        "kolibri1",
        "Kolibri1Config",
        "Kolibri1SparseMoeBlock",
        without(QWEN_SHARED, "intermediate_size"),
        {"not-normalised": {}, "normalised": {"norm_topk_prob": True}},
    ),
    *family(
        "D",
        "lfm2_moe",
        "Lfm2MoeConfig",
        "Lfm2MoeSparseMoeBlock",
        {**QWEN, "num_hidden_layers": 2},
        {
            "bias": {},
            "bias-not-normalised-scaled": {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
            "no-bias": {"use_expert_bias": False, "routed_scaling_factor": 2.5},
            "no-bias-not-normalised": {"use_expert_bias": False, "norm_topk_prob": False},
        },
    ),
    *family(
        "D",
        "muse_spark",
        "MuseSparkTextConfig",
        "MuseSparkMoE",
        _MUSE,
        {
            "plain": {},
            "scaled": {"routed_scaling_factor": 2.5, "output_multiplier": 0.7},
            "large-norm-eps": {"post_norm_eps": 0.5, "rms_norm_eps": 0.1, "output_multiplier": 1.5},
        },
    ),
    *family(
        "D",
        "inkling",
        "InklingTextConfig",
        "InklingMoE",
        _INKLING,
        {"two-shared": {"n_shared_experts": 2}, "one-shared": {"n_shared_experts": 1, "route_scale": 1.5}},
    ),
    *family(
        "D",
        "inkling2",
        "Inkling2TextConfig",
        "Inkling2SparseMoeBlock",
        without(_INKLING, "intermediate_size"),
        {
            "plain": {},
            "softcaps-bite": {"mlp_gate_softcap": 0.5, "mlp_up_softcap": 0.7, "route_scale": 1.5},
            "sqrtsoftplus": {"scoring_func": "sqrtsoftplus"},
        },
    ),
    *family(
        "D",
        "llama4",
        "Llama4TextConfig",
        "Llama4TextMoe",
        {**MIXTRAL, "num_hidden_layers": 2},
        {"top-2": {}, "top-1": {"num_experts_per_tok": 1}, "gelu": {"hidden_act": "gelu", "num_experts_per_tok": 3}},
        replace(ROW, router="router", routing="llama4"),
    ),
)
