"""Table A, continued: families like DeepSeek-V2, and routers of single families."""

from dataclasses import replace

from shared_tests.zoo.tables import DEEPSEEK, GROUPS, ROW, family, twins

_GREEDY = {
    "greedy": {"topk_method": "greedy", "routed_scaling_factor": 1.0},
    "greedy-scaled": {"topk_method": "greedy", "routed_scaling_factor": 2.5},
    "groups": {"topk_method": "group_limited_greedy", "routed_scaling_factor": 2.5, **GROUPS},
}
_GROUPS_OR_NOT = {
    "plain": {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
    "groups-scaled": {**GROUPS, "routed_scaling_factor": 2.5},
}

DEEPSEEKS = (
    *twins(
        family(
            "A",
            "deepseek_v2",
            "DeepseekV2Config",
            "DeepseekV2Moe",
            DEEPSEEK,
            {**_GREEDY, "norm-that-is-ignored": {**_GREEDY["greedy"], "norm_topk_prob": True}},
        ),
        {"norm-that-is-ignored": "greedy"},
    ),
    *family("A", "deepseek_ocr2", "DeepseekOcr2TextConfig", "DeepseekOcr2TextMoe", DEEPSEEK, _GREEDY),
    *family(
        "A",
        "unlimited_ocr",
        "UnlimitedOcrTextConfig",
        "UnlimitedOcrTextMoe",
        {**DEEPSEEK, "num_attention_heads": 2, "num_key_value_heads": 2},
        _GREEDY,
    ),
    *family(
        "A",
        "mistral4",
        "Mistral4Config",
        "Mistral4MoE",
        DEEPSEEK,
        {**_GROUPS_OR_NOT, "groups-not-normalised": {**_GROUPS_OR_NOT["groups-scaled"], "norm_topk_prob": False}},
    ),
    *family("A", "mistral_large4", "MistralLarge4TextConfig", "MistralLarge4TextMoE", DEEPSEEK, _GROUPS_OR_NOT),
)

_GEMMA = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "top_k_experts": 3,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
_GEMMA_LAYER = replace(ROW, args=(0,), takes="gemma_layer", router="router")
_ZAYA = {
    "hidden_size": 32,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 1,
    "router_hidden_size": 12,
}
_DBRX = {"d_model": 32, "n_layers": 2}


def _dbrx(**changes: object) -> dict[str, object]:
    return {
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 24,
            "moe_num_experts": 8,
            "moe_top_k": 3,
            "ffn_act_fn": {"name": "silu"},
            **changes,
        }
    }


OTHERS = (
    *family(
        "A",
        "gemma4",
        "Gemma4TextConfig",
        "Gemma4TextDecoderLayer",
        {**_GEMMA, "enable_moe_block": True, "hidden_size_per_layer_input": 0},
        {"layer": {}, "silu": {"hidden_activation": "silu"}},
        _GEMMA_LAYER,
    ),
    *family(
        "A",
        "diffusion_gemma",
        "DiffusionGemmaTextConfig",
        "DiffusionGemmaDecoderTextLayer",
        _GEMMA,
        {"decoder-layer": {}},
        _GEMMA_LAYER,
    ),
    *family(
        "A",
        "diffusion_gemma",
        "DiffusionGemmaTextConfig",
        "DiffusionGemmaEncoderTextLayer",
        _GEMMA,
        {"encoder-layer": {}},
        _GEMMA_LAYER,
    ),
    *family("A", "zaya", "ZayaConfig", "ZayaSparseMoeBlock", _ZAYA, {"first-layer": {}}, replace(ROW, args=(0,))),
    *family(
        "A",
        "zaya",
        "ZayaConfig",
        "ZayaSparseMoeBlock",
        _ZAYA,
        {"with-states": {}},
        replace(ROW, args=(1,), takes="router_states"),
    ),
    *family(
        "A",
        "zaya",
        "ZayaConfig",
        "ZayaSparseMoeBlock",
        _ZAYA,
        {"without-states": {}},
        replace(ROW, args=(1,), same_numbers_as="first-layer", idle="gate.router_states_scale"),
    ),
    *family(
        "A",
        "dbrx",
        "DbrxConfig",
        "DbrxFFN",
        _DBRX,
        {
            "norm-1": _dbrx(moe_normalize_expert_weights=1.0),
            "norm-2": _dbrx(moe_normalize_expert_weights=2.0),
            "not-normalised": _dbrx(moe_normalize_expert_weights=None),
            "gelu": _dbrx(ffn_act_fn={"name": "gelu"}),
        },
        replace(ROW, router="router", routing="dbrx"),
    ),
)

ROWS_A_MORE = (*DEEPSEEKS, *OTHERS)
