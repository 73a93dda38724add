"""Rows of whole models: about two layers, at least one of them a Mixture of Experts, 8 experts, a vocabulary of 128."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared_tests.zoo.tables import without


@dataclass(frozen=True, eq=False)  # compared by identity: mappings have no hash
class ModelRow:
    """A causal language model: names of its classes, and the config's arguments.

    `registered`: whether its experts support `experts_implementation`.
    """

    config: str
    model: str
    arguments: Mapping[str, Any]
    registered: bool = True


# Arguments of all models; no end token, so that generation has a fixed length
TEXT = {
    "hidden_size": 64,
    "vocab_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
HEAD = {"head_dim": 16}
MIXTRAL = {**TEXT, "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN = {**TEXT, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3}
QWEN_SHARED = {**QWEN, **HEAD, "shared_expert_intermediate_size": 24}
DEEPSEEK = {
    **TEXT,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
}
KIMI = {**without(DEEPSEEK, "n_routed_experts"), "num_local_experts": 8}
OLMO = {**TEXT, "num_experts": 8, "num_experts_per_tok": 3}
GROUPS = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}
# Latent attention, sparse attention's indexer, linear attention
MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
INDEXER = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8}
# The first layer is dense, the second sparse, under two names of the key
SECOND = {"mlp_layer_types": ["dense", "sparse"]}
DENSE_1 = {"first_k_dense_replace": 1}

MODELS: dict[str, ModelRow] = {
    # softmax, then top-k
    "mixtral": ModelRow("MixtralConfig", "MixtralForCausalLM", MIXTRAL),
    "minimax": ModelRow("MiniMaxConfig", "MiniMaxForCausalLM", {**MIXTRAL, **HEAD, **HYBRID, "block_size": 4}),
    "qwen2_moe": ModelRow("Qwen2MoeConfig", "Qwen2MoeForCausalLM", without(QWEN_SHARED, "head_dim")),
    "qwen3_moe": ModelRow("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**QWEN, "norm_topk_prob": True}),
    "mellum": ModelRow("MellumConfig", "MellumForCausalLM", {**QWEN, **HEAD, **SECOND}),
    "qwen3_next": ModelRow("Qwen3NextConfig", "Qwen3NextForCausalLM", {**QWEN_SHARED, **LINEAR, **HYBRID}),
    "qwen3_5_moe": ModelRow(
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        {**without(QWEN_SHARED, "intermediate_size"), **LINEAR, **HYBRID},
    ),
    "qwen4_exp": ModelRow(
        "Qwen4ExpTextConfig",
        "Qwen4ExpForCausalLM",
        {
            **without(QWEN_SHARED, "intermediate_size"),
            **LINEAR,
            **HYBRID,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
            "hc_count": 2,
            "hc_lowrank": 8,
        },
    ),
    "olmoe": ModelRow("OlmoeConfig", "OlmoeForCausalLM", OLMO),
    "flex_olmo": ModelRow("FlexOlmoConfig", "FlexOlmoForCausalLM", OLMO),
    "jamba": ModelRow(
        "JambaConfig",
        "JambaForCausalLM",
        {
            **without(OLMO, "max_position_embeddings"),
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_dt_rank": 4,
            "mamba_d_state": 4,
        },
    ),
    "hunyuan_v1_moe": ModelRow(
        "HunYuanMoEV1Config", "HunYuanMoEV1ForCausalLM", {**TEXT, **HEAD, "num_experts": 8, "moe_topk": 2}
    ),
    "ernie4_5_moe": ModelRow(
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        {**TEXT, "moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 32, "moe_layer_start_index": 1},
    ),
    "gemma4": ModelRow(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            **TEXT,
            **HEAD,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "hidden_size_per_layer_input": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "deepseek_v2": ModelRow(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {**DEEPSEEK, **MLA, **DENSE_1, **GROUPS, "topk_method": "group_limited_greedy"},
    ),
    "mistral4": ModelRow("Mistral4Config", "Mistral4ForCausalLM", {**DEEPSEEK, **MLA, **DENSE_1, **GROUPS}),
    "longcat_flash": ModelRow(
        "LongcatFlashConfig",
        "LongcatFlashForCausalLM",
        {
            **without(TEXT, "intermediate_size", "num_hidden_layers"),
            **MLA,
            "head_dim": 8,
            "num_key_value_heads": 4,
            "num_layers": 2,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 8,
            "zero_expert_num": 4,
            "moe_topk": 3,
        },
        registered=False,
    ),
    "zaya": ModelRow(
        "ZayaConfig",
        "ZayaForCausalLM",
        {**without(QWEN, "intermediate_size"), **HEAD, "num_experts_per_tok": 1, "router_hidden_size": 12},
    ),
    "dbrx": ModelRow(
        "DbrxConfig",
        "DbrxForCausalLM",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "vocab_size": 128,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {
                "hidden_size": 64,
                "ffn_hidden_size": 32,
                "moe_num_experts": 8,
                "moe_top_k": 2,
                "ffn_act_fn": {"name": "silu"},
            },
        },
        registered=False,
    ),
    # top-k, then softmax
    "gpt_oss": ModelRow("GptOssConfig", "GptOssForCausalLM", {**MIXTRAL, **HEAD}),
    "granitemoe": ModelRow("GraniteMoeConfig", "GraniteMoeForCausalLM", MIXTRAL),
    "granitemoe_swa": ModelRow(
        "GraniteMoeSWAConfig", "GraniteMoeSWAForCausalLM", {**MIXTRAL, "shared_intermediate_size": 24}
    ),
    "granitemoeshared": ModelRow(
        "GraniteMoeSharedConfig", "GraniteMoeSharedForCausalLM", {**MIXTRAL, "shared_intermediate_size": 24}
    ),
    "granitemoehybrid": ModelRow(
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {**MIXTRAL, **MAMBA, "shared_intermediate_size": 24, "layer_types": ["mamba", "attention"]},
    ),
    "aria": ModelRow("AriaTextConfig", "AriaTextForCausalLM", {**TEXT, **HEAD, "moe_num_experts": 8, "moe_topk": 2}),
    "cohere2_moe": ModelRow(
        "Cohere2MoeConfig", "Cohere2MoeForCausalLM", {**OLMO, **HEAD, "num_shared_experts": 1, "logit_scale": 1.0}
    ),
    "jetmoe": ModelRow(
        "JetMoeConfig",
        "JetMoeForCausalLM",
        {**without(MIXTRAL, "num_attention_heads"), "kv_channels": 16},
        registered=False,
    ),
    # sigmoid with a bias and groups
    "deepseek_v3": ModelRow("DeepseekV3Config", "DeepseekV3ForCausalLM", {**DEEPSEEK, **MLA, **DENSE_1, **GROUPS}),
    "deepseek_v32": ModelRow(
        "DeepseekV32Config", "DeepseekV32ForCausalLM", {**DEEPSEEK, **MLA, **SECOND, **GROUPS, **INDEXER}
    ),
    "glm4_moe": ModelRow("Glm4MoeConfig", "Glm4MoeForCausalLM", {**DEEPSEEK, **DENSE_1}),
    "glm4_moe_lite": ModelRow("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", {**DEEPSEEK, **MLA, **SECOND}),
    "glm_moe_dsa": ModelRow("GlmMoeDsaConfig", "GlmMoeDsaForCausalLM", {**DEEPSEEK, **MLA, **SECOND, **INDEXER}),
    "dots1": ModelRow("Dots1Config", "Dots1ForCausalLM", {**DEEPSEEK, **DENSE_1}),
    "solar_open": ModelRow(
        "SolarOpenConfig", "SolarOpenForCausalLM", {**without(DEEPSEEK, "intermediate_size"), **HEAD}
    ),
    "kimi_linear": ModelRow(
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        {**KIMI, "linear_head_dim": 16, "linear_num_heads": 4, **MLA, **SECOND, **HYBRID},
    ),
    "bailing_hybrid": ModelRow(
        "BailingHybridConfig",
        "BailingHybridForCausalLM",
        {**KIMI, **without(MLA, "q_lora_rank"), **SECOND, **HYBRID, **GROUPS},
    ),
    "exaone_moe": ModelRow("ExaoneMoeConfig", "ExaoneMoeForCausalLM", {**QWEN, **SECOND, "num_shared_experts": 1}),
    "axk1": ModelRow("AXK1Config", "AXK1ForCausalLM", {**DEEPSEEK, **MLA, **SECOND, **GROUPS}),
    "axk2": ModelRow("AXK2Config", "AXK2ForCausalLM", {**DEEPSEEK, **MLA, **SECOND, **INDEXER}),
    "mimo_v2_flash": ModelRow(
        "MiMoV2FlashConfig",
        "MiMoV2FlashForCausalLM",
        {**without(DEEPSEEK, "n_shared_experts"), **SECOND, "num_key_value_heads": 2, "head_dim": 24, "v_head_dim": 16},
    ),
    "beam": ModelRow("BeamConfig", "BeamForCausalLM", {**QWEN, **GROUPS, **SECOND}),
    "hy_v4": ModelRow("HYV4Config", "HYV4ForCausalLM", {**DEEPSEEK, **MLA, **SECOND, **INDEXER}),
    "dots3_note": ModelRow("Dots3NoteTextConfig", "Dots3NoteForCausalLM", {**DEEPSEEK, **MLA, **SECOND, **INDEXER}),
    "nemotron_h": ModelRow(
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            **without(DEEPSEEK, "num_hidden_layers", "n_shared_experts"),
            **HEAD,
            "layers_block_type": ["mamba", "moe", "attention"],
            "moe_shared_expert_intermediate_size": 24,
            "moe_latent_size": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
        },
    ),
    # sigmoid without groups
    "minimax_m2": ModelRow("MiniMaxM2Config", "MiniMaxM2ForCausalLM", {**MIXTRAL, **HEAD}),
    "minimax_m3_vl": ModelRow(
        "MiniMaxM3VLTextConfig",
        "MiniMaxM3VLForCausalLM",
        {**MIXTRAL, **HEAD, "dense_intermediate_size": 40, "shared_intermediate_size": 24},
    ),
    "laguna": ModelRow(
        "LagunaConfig", "LagunaForCausalLM", {**QWEN_SHARED, **SECOND, "moe_routed_scaling_factor": 2.5}
    ),
    "afmoe": ModelRow(
        "AfmoeConfig", "AfmoeForCausalLM", {**QWEN, **HEAD, "num_shared_experts": 1, "num_dense_layers": 1}
    ),
    "hy_v3": ModelRow("HYV3Config", "HYV3ForCausalLM", {**QWEN, **HEAD, **SECOND, "num_shared_experts": 1}),
    "flint": ModelRow("FlintConfig", "FlintForCausalLM", {**QWEN_SHARED, "mlp_only_layers": [0]}),
    "kolibri1": ModelRow("Kolibri1Config", "Kolibri1ForCausalLM", without(QWEN_SHARED, "intermediate_size")),
    "lfm2_moe": ModelRow(
        "Lfm2MoeConfig",
        "Lfm2MoeForCausalLM",
        {**QWEN, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    "inkling": ModelRow(
        "InklingTextConfig", "InklingForCausalLM", {**DEEPSEEK, **HEAD, **SECOND, "n_shared_experts": 2}
    ),
    "inkling2": ModelRow(
        "Inkling2TextConfig",
        "Inkling2ForCausalLM",
        {**without(DEEPSEEK, "intermediate_size", "n_shared_experts"), **HEAD},
    ),
    "llama4": ModelRow(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {**MIXTRAL, **HEAD, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 1},
        registered=False,
    ),
    # other
    "deepseek_v4": ModelRow(
        "DeepseekV4Config",
        "DeepseekV4ForCausalLM",
        {**without(DEEPSEEK, "intermediate_size"), **HEAD, "mlp_layer_types": ["hash_moe", "moe"], "q_lora_rank": 24},
    ),
    "phimoe": ModelRow("PhimoeConfig", "PhimoeForCausalLM", MIXTRAL),
}
