"""Table C: sigmoid scores, a correction bias, groups of experts."""

from dataclasses import replace

from shared_tests.zoo.tables import DEEPSEEK, GROUPS, ROW, family, without

_ONE_GROUP = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0}
_GROUPED = {**GROUPS, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
_BOTH = {"plain": _ONE_GROUP, "groups-scaled": _GROUPED}
_ALL = {**_BOTH, "groups-not-normalised": {**_GROUPED, "norm_topk_prob": False}}
_MORE = {
    "gelu": {**_GROUPED, "hidden_act": "gelu_new"},
    "one-group-of-two": {**_GROUPED, "n_group": 2, "topk_group": 1},
    "sixteen-experts": {**_GROUPED, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 1},
}
# kimi_linear and bailing_hybrid have other keys
_KIMI = {**without(DEEPSEEK, "n_routed_experts"), "num_local_experts": 8}
_EXAONE = {**without(DEEPSEEK, "n_routed_experts", "n_shared_experts"), "num_experts": 8, "num_shared_experts": 2}
_BEAM = {**without(DEEPSEEK, "n_routed_experts", "n_shared_experts"), "num_experts": 8}
_ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 2}

SAME_CODE = (
    *family("C", "deepseek_v3", "DeepseekV3Config", "DeepseekV3MoE", DEEPSEEK, {**_ALL, **_MORE}),
    *family("C", "deepseek_v32", "DeepseekV32Config", "DeepseekV32MoE", DEEPSEEK, _BOTH),
    *family("C", "glm4_moe", "Glm4MoeConfig", "Glm4MoeMoE", DEEPSEEK, _ALL),
    *family("C", "glm4_moe_lite", "Glm4MoeLiteConfig", "Glm4MoeLiteMoE", DEEPSEEK, _BOTH),
    *family("C", "glm4v_moe", "Glm4vMoeTextConfig", "Glm4vMoeTextMoE", DEEPSEEK, _BOTH),
    *family("C", "glm_moe_dsa", "GlmMoeDsaConfig", "GlmMoeDsaMoE", DEEPSEEK, _BOTH),
    *family("C", "dots1", "Dots1Config", "Dots1MoE", DEEPSEEK, _ALL),
    *family("C", "solar_open", "SolarOpenConfig", "SolarOpenMoE", without(DEEPSEEK, "intermediate_size"), _BOTH),
    *family("C", "kimi_linear", "KimiLinearConfig", "KimiLinearMoE", _KIMI, _BOTH),
    *family("C", "bailing_hybrid", "BailingHybridConfig", "BailingHybridMoE", _KIMI, _BOTH),
    *family("C", "exaone_moe", "ExaoneMoeConfig", "ExaoneMoeSparseMoEBlock", _EXAONE, _BOTH),
)

VARIATIONS = (
    *family("C", "axk1", "AXK1Config", "AXK1MoE", DEEPSEEK, _ALL),
    *family(
        "C",
        "axk2",
        "AXK2Config",
        "AXK2MoE",
        DEEPSEEK,
        {
            "no-groups": {"n_group": None, "topk_group": None, "routed_scaling_factor": 2.5},
            "groups-scaled": _GROUPED,
            "groups-not-normalised": {**_GROUPED, "norm_topk_prob": False},
        },
    ),
    *family("C", "mimo_v2_flash", "MiMoV2FlashConfig", "MiMoV2FlashMoE", without(DEEPSEEK, "n_shared_experts"), _ALL),
    *family("C", "beam", "BeamConfig", "BeamMoE", _BEAM, {**_ALL, "gelu": {**_GROUPED, "hidden_act": "gelu"}}),
    *family(
        "C",
        "glm5_next",
        "Glm5NextTextConfig",
        "Glm5NextTextMoE",
        DEEPSEEK,
        {**_BOTH, "limit-bites": {**_GROUPED, "swiglu_limit": 0.4}},
    ),
    *family(
        "C", "hy_v4", "HYV4Config", "HYV4MoE", DEEPSEEK, {**_BOTH, "limit-bites": {**_GROUPED, "swiglu_limit": 0.4}}
    ),
    *family(
        "C",
        "dots3_note",
        "Dots3NoteTextConfig",
        "Dots3NoteTextMoE",
        {**DEEPSEEK, "shared_experts_intermediate_size": 20, **_ATTENTION},
        _BOTH,
    ),
    *family(
        "C",
        "dots3_note",
        "Dots3NoteVisionConfig",
        "Dots3NoteVisionMoE",
        {
            "hidden_size": 32,
            "adapter_in_dim": 32,
            "num_attention_heads": 2,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_experts_per_tok": 3,
            "pyramid_num_routed": [-1, 8],
        },
        {"vision": {}, "vision-scaled": {"router_scaling_factor": 2.5}},
        replace(ROW, args=(1,)),
    ),
)

_NEMOTRON = {
    **without(DEEPSEEK, "n_shared_experts", "num_hidden_layers"),
    "moe_shared_expert_intermediate_size": 20,
    "layers_block_type": ["mamba", "moe"],
}

NEMOTRON = family(
    "C",
    "nemotron_h",
    "NemotronHConfig",
    "NemotronHMoE",
    _NEMOTRON,
    {
        **_ALL,
        "latent": {**_GROUPED, "moe_latent_size": 16},
        "latent-with-bias": {**_GROUPED, "moe_latent_size": 16, "mlp_bias": True},
        "silu": {**_GROUPED, "mlp_hidden_act": "silu"},
    },
)

ROWS_C = (*SAME_CODE, *VARIATIONS, *NEMOTRON)
