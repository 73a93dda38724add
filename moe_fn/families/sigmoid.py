"""Families whose router is a sigmoid: with groups (C), and without (D).

Defaults are those of transformers 5.23; a test compares them with the config classes.
"""

from moe_fn.families import config_class
from moe_fn.families.config_class import ConfigClass
from moe_fn.families.keys import Given, Limit, Times, key
from moe_fn.families.row import (
    ACTIVATIONS,
    CLAMPED,
    LIMIT,
    LOCAL_IS_NUM,
    LOCAL_IS_ROUTED,
    NORM_TOP_K,
    NUM_IS_LOCAL,
    NUM_SHARED,
    OAI,
    PLAIN,
    RMS_EPSILON,
    ROUTER,
    SCALE,
    SCORINGS,
    SHARED_BY_SIZE,
    SILU,
    WIDTH,
    WIDTH_OF_SHARED,
    Family,
    LiveBlock,
    ModelType,
    Part,
    Shared,
    made,
    same,
)
from moe_fn.families.tensor_names import (
    DEEPSEEK,
    EACH,
    FUSED,
    MIXTRAL,
    QWEN,
    ROUTER_AND_SHARED,
    TRANSPOSED,
    W132,
    Entry,
    TensorNames,
    fused,
    latent,
    per_expert,
    router,
    shared,
    ungated,
    ungated_shared,
)

_GROUP_COUNT = key(".num_group", "n_group", "num_expert_group", kind="int")
_GROUPS = {
    "count": _GROUP_COUNT,
    "top_k": key(".topk_group", "topk_group", kind="int"),
    "score": "top2_sum",
}
_BIASED = {"scoring": "sigmoid", "correction_bias": "scores"}
# DeepSeek-V3: a bias for the choice, groups scored by their two best experts, renormalized, scaled.
_V3 = _BIASED | {
    "groups": _GROUPS,
    "renormalize": NORM_TOP_K,
    "renormalize_epsilon": 1e-20,
    "routed_scaling_factor": SCALE,
}
_V3_CONFIG = ConfigClass(
    {
        "hidden_size": 7168, "moe_intermediate_size": 2048, "n_shared_experts": 1, "n_routed_experts": 256,
        "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "hidden_act": "silu",
    },
    renamed=LOCAL_IS_ROUTED,
    nullable=("n_group", "topk_group", "num_experts_per_tok", "norm_topk_prob"),
)  # fmt: skip
_KIMI_NAMES = {
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
}
_LATENT_SIZE = key("moe_latent_size", kind="int")
_SILU_CLAMPED = SILU | {"limit": LIMIT}  # hidden_act is not read

WITH_GROUPS: tuple[Family, ...] = (
    Family(
        models=(
            ModelType("deepseek_v3", ("DeepseekV3MoE",), DEEPSEEK, _V3_CONFIG, (Part("kimi_k25", chosen=True),)),
            ModelType(
                "deepseek_v32", ("DeepseekV32MoE",), DEEPSEEK,
                ConfigClass({
                    "hidden_size": 7168, "moe_intermediate_size": 2048, "n_shared_experts": 1, "n_routed_experts": 256,
                    "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
                    "norm_topk_prob": True, "hidden_act": "silu",
                }, renamed=LOCAL_IS_ROUTED, older=config_class.number_of_experts),
            ),
            ModelType("kimi_k2", (), DEEPSEEK, _V3_CONFIG),  # a name of DeepSeek-V3's class
            ModelType("glm4_moe", ("Glm4MoeMoE",), DEEPSEEK, ConfigClass({
                "hidden_size": 4096, "hidden_act": "silu", "moe_intermediate_size": 1408, "num_experts_per_tok": 8,
                "n_shared_experts": 1, "n_routed_experts": 128, "routed_scaling_factor": 1.0, "n_group": 1,
                "topk_group": 1, "norm_topk_prob": True,
            }, renamed=LOCAL_IS_ROUTED)),
            ModelType(
                "glm4_moe_lite", ("Glm4MoeLiteMoE",), DEEPSEEK,
                ConfigClass({
                    "hidden_size": 2048, "moe_intermediate_size": 1536, "n_shared_experts": 1, "n_routed_experts": 64,
                    "routed_scaling_factor": 1.8, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4,
                    "norm_topk_prob": True, "hidden_act": "silu",
                }, renamed=LOCAL_IS_ROUTED),
            ),
            ModelType(
                "glm4v_moe_text", ("Glm4vMoeTextMoE",), DEEPSEEK,
                ConfigClass({
                    "hidden_size": 4096, "hidden_act": "silu", "moe_intermediate_size": 1408, "num_experts_per_tok": 8,
                    "n_shared_experts": 1, "n_routed_experts": 128, "routed_scaling_factor": 1.0, "n_group": 1,
                    "topk_group": 1, "norm_topk_prob": True,
                }, renamed=LOCAL_IS_ROUTED),
                inside=(Part("glm4v_moe"),),
            ),
            ModelType(
                "glm_moe_dsa", ("GlmMoeDsaMoE",), DEEPSEEK,
                ConfigClass({
                    "hidden_size": 6144, "moe_intermediate_size": 2048, "n_shared_experts": 1, "n_routed_experts": 256,
                    "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 8,
                    "norm_topk_prob": True, "hidden_act": "silu",
                }, renamed=LOCAL_IS_ROUTED, older=config_class.number_of_experts),
            ),
            ModelType(
                "dots1", ("Dots1MoE",), DEEPSEEK,
                ConfigClass(
                    {
                        "hidden_size": 4608, "moe_intermediate_size": 1408, "n_shared_experts": None,
                        "n_routed_experts": None, "n_group": 1, "topk_group": 1, "num_experts_per_tok": None,
                        "norm_topk_prob": False, "hidden_act": "silu", "routed_scaling_factor": 1.0,
                    },
                    renamed=LOCAL_IS_ROUTED,
                    nullable=(
                        "n_shared_experts", "n_routed_experts", "n_group", "topk_group", "num_experts_per_tok",
                        "norm_topk_prob",
                    ),
                ),
            ),
            ModelType("solar_open", ("SolarOpenMoE",), DEEPSEEK, ConfigClass({
                "hidden_size": 4096, "hidden_act": "silu", "moe_intermediate_size": 1280, "num_experts_per_tok": 8,
                "n_shared_experts": 1, "n_routed_experts": 128, "routed_scaling_factor": 1.0, "n_group": 1,
                "topk_group": 1, "norm_topk_prob": True,
            }, renamed=LOCAL_IS_ROUTED)),
            ModelType(
                "kimi_linear", ("KimiLinearMoE",),
                (TensorNames("kimi_linear", "block_sparse_moe", W132 + ROUTER_AND_SHARED),),
                ConfigClass({
                    "hidden_size": 2304, "moe_intermediate_size": 1024, "n_shared_experts": 1,
                    "routed_scaling_factor": 2.446, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 8,
                    "norm_topk_prob": True, "hidden_act": "silu", "num_local_experts": 256,
                }, renamed=_KIMI_NAMES, nullable=("topk_group", "num_experts_per_tok")),
            ),
            ModelType(
                "bailing_hybrid", ("BailingHybridMoE",),
                (TensorNames("bailing", "mlp", EACH + router("gate.weight", "gate.expert_bias") + shared()),),
                ConfigClass({
                    "hidden_size": 2560, "moe_intermediate_size": 768, "n_shared_experts": 1,
                    "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
                    "norm_topk_prob": True, "hidden_act": "silu", "num_local_experts": 512,
                }, renamed=_KIMI_NAMES),
            ),
            ModelType(
                "exaone_moe", ("ExaoneMoeSparseMoEBlock",),
                (
                    *DEEPSEEK,
                    TensorNames("exaone", "mlp", EACH + router("gate.weight", "e_score_correction_bias") + shared()),
                ),
                ConfigClass({
                    "hidden_size": 4096, "hidden_act": "silu", "moe_intermediate_size": 1024, "num_experts": 64,
                    "num_experts_per_tok": 8, "num_shared_experts": 1, "norm_topk_prob": True,
                    "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1,
                }),
            ),
        ),
        router=_V3,
        shared=Shared(),
    ),
    Family(
        models=(
            ModelType(
                "mimo_v2_flash", ("MiMoV2FlashMoE",), DEEPSEEK,
                ConfigClass(
                    {
                        "hidden_size": 4096, "hidden_act": "silu", "moe_intermediate_size": 2048,
                        "num_experts_per_tok": 8, "n_routed_experts": 256, "routed_scaling_factor": 1.0, "n_group": 1,
                        "topk_group": 1, "norm_topk_prob": True,
                    },
                    renamed=LOCAL_IS_ROUTED,
                    nullable=("routed_scaling_factor",),
                    older=config_class.scale_or_one,
                ),
            ),
        ),
        router=_V3,
    ),
    Family(
        models=(
            ModelType(
                "dots3_note_text", ("Dots3NoteTextMoE",), DEEPSEEK,
                ConfigClass({
                    "hidden_size": 5120, "moe_intermediate_size": 1536, "n_shared_experts": 1, "n_routed_experts": 256,
                    "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 8,
                    "norm_topk_prob": True, "hidden_act": "silu", "shared_experts_intermediate_size": 1536,
                }, renamed=LOCAL_IS_ROUTED, older=config_class.width_of_shared),
                inside=(Part("dots3_note"),),
            ),
        ),
        router=_V3,
        shared=Shared(width=Times(key("shared_experts_intermediate_size", kind="int"), NUM_SHARED)),
    ),
    Family(
        models=(
            ModelType(
                "axk1", ("AXK1MoE",),
                (
                    TensorNames(
                        "axk1", "mlp",
                        (*EACH, *ROUTER_AND_SHARED, Entry(("output_norm",), "../post_mlp_layernorm.weight", "H")),
                    ),
                ),
                ConfigClass({
                    "hidden_size": 7168, "moe_intermediate_size": 2048, "n_shared_experts": 1, "n_routed_experts": 192,
                    "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
                    "norm_topk_prob": True, "hidden_act": "silu", "rms_norm_eps": 1e-06,
                }, renamed=LOCAL_IS_ROUTED, nullable=("norm_topk_prob",)),
            ),
        ),
        router=_V3,
        shared=Shared(),
        layer={"norms": {"epsilon": RMS_EPSILON, "output": True}},
        live=LiveBlock(tensors={"output_norm": same("post_mlp_layernorm.weight")}),
    ),
    Family(
        models=(
            ModelType(
                "axk2", ("AXK2MoE",), DEEPSEEK,
                ConfigClass(
                    {
                        "hidden_size": 2048, "moe_intermediate_size": 512, "n_shared_experts": 1,
                        "n_routed_experts": 128, "routed_scaling_factor": 2.5, "n_group": None, "topk_group": None,
                        "num_experts_per_tok": 8, "norm_topk_prob": True, "hidden_act": "silu",
                    },
                    renamed=LOCAL_IS_ROUTED,
                    nullable=("n_group", "topk_group"),
                    older=config_class.groups_or_none,
                ),
            ),
        ),
        router=_V3 | {"groups": Given(_GROUP_COUNT, _GROUPS | {"fill": "zero"}, None)},
        shared=Shared(),
    ),
    Family(
        models=(
            ModelType("beam", ("BeamMoE",), DEEPSEEK, ConfigClass({
                "hidden_size": 5120, "hidden_act": "silu", "moe_intermediate_size": 2560, "num_experts_per_tok": 8,
                "num_experts": 256, "norm_topk_prob": True, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
            }, nullable=("n_group", "topk_group"))),
        ),
        router=_V3 | {"scale_on": "output"},
    ),
    Family(
        models=(
            ModelType(
                "glm5_next_text", ("Glm5NextTextMoE",), DEEPSEEK,
                ConfigClass({
                    "hidden_size": 4096, "moe_intermediate_size": 2048, "n_shared_experts": 1, "n_routed_experts": 288,
                    "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 8,
                    "norm_topk_prob": True, "hidden_act": "silu", "swiglu_limit": 10.0,
                }, renamed=LOCAL_IS_ROUTED),
                inside=(Part("glm5_next"),),
            ),
        ),
        router=_V3,
        activation=_SILU_CLAMPED,
        shared=Shared(activation=CLAMPED),
    ),
    Family(
        models=(
            ModelType(
                "hy_v4", ("HYV4MoE",),
                (
                    *DEEPSEEK,
                    TensorNames(
                        "hy_v4", "mlp",
                        FUSED + router("gate.weight", "gate.e_score_correction_bias") + shared(gate="linear_gate"),
                        also_split=True,
                    ),
                ),
                ConfigClass({
                    "hidden_size": 2816, "moe_intermediate_size": 768, "hidden_act": "silu", "n_routed_experts": 256,
                    "n_shared_experts": 1, "num_experts_per_tok": 8, "routed_scaling_factor": 2.827,
                    "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "swiglu_limit": 10.0,
                }, renamed=LOCAL_IS_ROUTED),
            ),
        ),
        router=_V3,
        activation=_SILU_CLAMPED,
        shared=Shared(activation=PLAIN),
    ),
    Family(
        models=(
            ModelType(
                "nemotron_h", ("NemotronHMoE",),
                (
                    TensorNames(
                        "nemotron_h", "mixer",
                        ungated("up_proj", "down_proj") + router("gate.weight", "gate.e_score_correction_bias")
                        + ungated_shared("shared_experts", "up_proj", "down_proj")
                        + latent("fc1_latent_proj", "fc2_latent_proj"),
                    ),
                ),
                ConfigClass(
                    {
                        "hidden_size": 4096, "mlp_hidden_act": "relu2", "n_routed_experts": 8,
                        "moe_intermediate_size": 7688, "moe_shared_expert_intermediate_size": 7688,
                        "moe_latent_size": None, "num_experts_per_tok": 2, "routed_scaling_factor": 1.0, "n_group": 1,
                        "topk_group": 1, "norm_topk_prob": True,
                    },
                    renamed=LOCAL_IS_ROUTED,
                    nullable=("moe_latent_size",),
                    older=config_class.refuse_shared_of_width_0,
                ),
                inside=(Part("nemo_speechlm", chosen=True), Part("nemotron_h_omni", chosen=True)),
            ),
        ),
        router=_V3,
        activation={"act": key(".act_fn", "mlp_hidden_act", values=ACTIVATIONS), "gated": False},
        shared=Shared(width=key("moe_shared_expert_intermediate_size", kind="int")),
        layer={"latent": Given(_LATENT_SIZE, {"size": _LATENT_SIZE}, None)},
        live=LiveBlock(
            tensors={
                "latent.input": same("fc1_latent_proj.weight"),
                "latent.input_bias": same("fc1_latent_proj.bias"),
                "latent.output": same("fc2_latent_proj.weight"),
                "latent.output_bias": same("fc2_latent_proj.bias"),
            }
        ),
    ),
)  # fmt: skip

_ALWAYS = _BIASED | {"renormalize": True}
_STEP_LIMIT = Limit(key(".limit", "swiglu_limits", kind="number"), zero_is_none=True)
_STEP_SHARED_LIMIT = Limit(key(".limit", "swiglu_limits_shared", kind="number"), zero_is_none=True)
_LAGUNA_SOFTCAP = Limit(
    key(".router_logit_softcapping", "moe_router_logit_softcapping", kind="number"), zero_is_none=True
)

_INKLING_MOE = {"scoring": "sigmoid", "correction_bias": "scores", "renormalize": True, "routed_scaling_factor": SCALE}
_INKLING_SCALE = Entry(("router", "expert_scale"), "gate.global_scale", "1")
_W13 = fused("experts.w13_weight", "experts.w2_weight", "I G") + router("gate.weight", "gate.bias")

WITHOUT_GROUPS: tuple[Family, ...] = (
    Family(
        models=(
            ModelType(
                "minimax_m2", ("MiniMaxM2SparseMoeBlock",), MIXTRAL, ConfigClass({
                    "hidden_size": 3072, "intermediate_size": 1536, "hidden_act": "silu", "num_experts_per_tok": 8,
                    "num_local_experts": 256,
                }, renamed=NUM_IS_LOCAL)
            ),
        ),
        router=_ALWAYS | {"gate_dtype": "input"},
    ),
    Family(
        models=(
            ModelType(
                "minimax_m3_vl_text", ("MiniMaxM3VLSparseMoeBlock",),
                (
                    *MIXTRAL,
                    TensorNames(  # as transformers saves the text model alone
                        "minimax_m3 fused", "mlp",
                        (
                            *FUSED, *router("gate.weight", "gate.e_score_correction_bias"),
                            Entry(("shared", "gate_up"), "shared_experts.gate_up_proj.weight", "(B N M) H"),
                            Entry(("shared", "down"), "shared_experts.down_proj.weight", "H (N M)"),
                        ),
                    ),
                ),
                ConfigClass({
                    "hidden_size": 6144, "intermediate_size": 3072, "num_experts_per_tok": 4, "num_local_experts": 128,
                    "shared_intermediate_size": 3072, "routed_scaling_factor": 2.0, "swiglu_alpha": 1.702,
                    "swiglu_limit": 7.0,
                }, renamed=NUM_IS_LOCAL),
                inside=(Part("minimax_m3_vl"),),
            ),
        ),
        router=_ALWAYS | {"gate_dtype": "input", "routed_scaling_factor": SCALE, "scale_on": "output"},
        activation=OAI,
        shared=Shared(width=key("shared_intermediate_size", kind="int")),
        intermediate_size=WIDTH,
    ),
    Family(
        models=(
            ModelType(
                "step3p5", ("Step3p7SparseMoeBlock",),
                (
                    TensorNames(
                        "step3", "moe",
                        (
                            Entry(("gate_up",), "gate_proj.weight", "E I X", (("G", 0),)),
                            Entry(("gate_up",), "up_proj.weight", "E I X", (("G", 1),)),
                            Entry(("down",), "down_proj.weight", "E X I"),
                            *router("gate.weight", "router_bias"),
                            *shared("../share_expert"),
                        ),
                        owned=("", "../share_expert."),
                    ),
                ),
                ConfigClass(
                    {
                        "hidden_size": 4096, "num_experts_per_tok": 8, "num_local_experts": 128,
                        "moe_intermediate_size": 1280, "n_routed_experts": 288, "share_expert_dim": 1280,
                        "moe_router_scaling_factor": 1.0, "swiglu_limits": None, "swiglu_limits_shared": None,
                    },
                    renamed=LOCAL_IS_ROUTED
                    | {
                        "moe_num_experts": "n_routed_experts", "moe_top_k": "num_experts_per_tok",
                        "share_expert_dims": "share_expert_dim",
                    },
                    nullable=("swiglu_limits", "swiglu_limits_shared"),
                    older=config_class.limits_or_none,
                ),
                inside=(Part("step3p7"),),
            ),
        ),
        router=_ALWAYS | {"gate_dtype": "input", "routed_scaling_factor": SCALE, "scale_on": "output"},
        activation=SILU | {"limit": _STEP_LIMIT, "limit_at": "output"},
        shared=Shared(
            width=key("share_expert_dim", kind="int"),
            activation=SILU | {"limit": _STEP_SHARED_LIMIT, "limit_at": "output"},
        ),
    ),
    Family(
        models=(
            ModelType(
                "laguna", ("LagunaSparseMoeBlock",),
                (
                    TensorNames(
                        "laguna", "mlp",
                        EACH + router("gate.weight", "experts.e_score_correction_bias") + shared("shared_expert"),
                    ),
                ),
                ConfigClass({
                    "hidden_size": 2048, "hidden_act": "silu", "moe_intermediate_size": 512,
                    "shared_expert_intermediate_size": 512, "num_experts_per_tok": 8, "num_experts": 256,
                    "moe_routed_scaling_factor": 1.0, "moe_router_logit_softcapping": 0.0,
                }, older=config_class.weight_on_output),
            ),
        ),
        router=_ALWAYS
        | {
            "gate_dtype": "input",
            "logit_softcap": _LAGUNA_SOFTCAP,
            "routed_scaling_factor": SCALE,
            "scale_on": "output",
        },
        shared=Shared(width=SHARED_BY_SIZE),
    ),
    Family(
        models=(
            ModelType(
                "afmoe", ("AfmoeSparseMoeBlock",),
                (TensorNames("afmoe", "mlp", EACH + router("router.gate.weight", "expert_bias") + shared()),),
                ConfigClass(
                    {
                        "hidden_size": 2048, "moe_intermediate_size": 1408, "hidden_act": "silu", "num_experts": 64,
                        "num_experts_per_tok": 6, "num_shared_experts": 2, "route_scale": 1.0,
                    },
                    nullable=("num_experts", "num_experts_per_tok", "num_shared_experts", "route_scale"),
                ),
            ),
        ),
        router=_ALWAYS | {"renormalize_epsilon": 1e-20, "routed_scaling_factor": SCALE, "gate_dtype": "input"},
        shared=Shared(),
        live=ROUTER,
    ),
    Family(
        models=(
            ModelType(
                "hy_v3", ("HYV3MoE",),
                (
                    TensorNames(
                        "hy_v3", "mlp", EACH + router("router.gate.weight", "expert_bias") + shared("shared_mlp")
                    ),
                ),
                ConfigClass(
                    {
                        "hidden_size": 4096, "hidden_act": "silu", "num_experts": 192, "num_experts_per_tok": 8,
                        "num_shared_experts": 1, "moe_intermediate_size": 1536, "router_scaling_factor": 2.826,
                    },
                    renamed=LOCAL_IS_NUM,
                    nullable=("num_experts", "num_experts_per_tok", "num_shared_experts"),
                    older=config_class.refuse_shared_of_width_0,
                ),
            ),
        ),
        router=_ALWAYS | {"renormalize_epsilon": 1e-20, "routed_scaling_factor": SCALE},
        shared=Shared(),
    ),
    Family(
        models=(
            ModelType(
                "dots3_note_vision_encoder", ("Dots3NoteVisionMoE",),
                (
                    TensorNames(
                        "dots3_note, images", "mlp",
                        per_expert("fc1", "fc3", "fc2") + router("gate_weight", "router_bias"),
                    ),
                ),
                ConfigClass(
                    {
                        "hidden_size": 1536, "hidden_act": "silu", "moe_intermediate_size": 2112,
                        "num_local_experts": 64, "num_experts_per_tok": None, "router_scaling_factor": None,
                    },
                    nullable=("num_experts_per_tok", "router_scaling_factor"),
                    older=config_class.pyramid,
                ),
                inside=(Part("dots3_note", ("vision_config",), ("vision_tower", "vision_encoder", "visual")),),
            ),
        ),
        router=_ALWAYS | {"renormalize_epsilon": 1e-20, "routed_scaling_factor": SCALE},
    ),
    Family(
        models=(ModelType("flint", ("FlintSparseMoeBlock",), QWEN, ConfigClass({
            "hidden_size": 2048, "hidden_act": "silu", "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 1024, "num_experts_per_tok": 6, "num_experts": 256,
            "norm_topk_prob": True,
        })),),
        router={"scoring": "sigmoid", "renormalize": NORM_TOP_K},
        shared=Shared(width=SHARED_BY_SIZE),
    ),
    Family(
        models=(
            ModelType(
                "kolibri1", ("Kolibri1SparseMoeBlock",),
                (
                    TensorNames(
                        "kolibri", "mlp", EACH + router("gate.weight", "../moe.router.expert_bias") + shared()
                    ),
                ),
                ConfigClass({
                    "hidden_size": 2560, "hidden_act": "silu", "moe_intermediate_size": 512, "num_experts_per_tok": 6,
                    "num_experts": 384, "norm_topk_prob": False, "shared_expert_intermediate_size": 512,
                }, renamed=NUM_IS_LOCAL),
            ),
        ),
        router={
            "scoring": "sigmoid",
            "scoring_order": "after_top_k",
            "correction_bias": "logits",
            "renormalize": NORM_TOP_K,
        },
        shared=Shared(width=SHARED_BY_SIZE),
    ),
    Family(
        models=(
            ModelType(
                "lfm2_moe", ("Lfm2MoeSparseMoeBlock",),
                (TensorNames("lfm2", "feed_forward", W132 + router("gate.weight", "expert_bias")),),
                ConfigClass({
                    "hidden_size": 2048, "moe_intermediate_size": 1792, "num_experts_per_tok": 4, "num_experts": 32,
                    "use_expert_bias": True, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
                }),
            ),
        ),
        router={
            "scoring": "sigmoid",
            "correction_bias": key(".use_expert_bias", "use_expert_bias", values={True: "scores", False: "none"}),
            "renormalize": NORM_TOP_K,
            "renormalize_epsilon": 1e-6,
            "routed_scaling_factor": SCALE,
            "gate_dtype": "input",
            "score_dtype": "input",
        },
        activation=SILU,
    ),
    Family(
        models=(
            ModelType(
                "muse_spark_text", ("MuseSparkMoE",),
                (
                    TensorNames(
                        "muse_spark", "mlp",
                        (
                            *FUSED,
                            *router("gate.weight", "gate.e_score_correction_bias"),
                            Entry(("expert_norm",), "experts.post_expert_norm.weight", "X", offset=1.0),
                            *latent("pre_expert_proj", "post_expert_proj", "pre_expert_norm", offset=1.0),
                        ),
                        also_split=True,
                    ),
                ),
                ConfigClass({
                    "hidden_size": 8192, "rms_norm_eps": 1e-05, "output_multiplier": 0.1767766952966369,
                    "post_norm_eps": 1e-08, "hidden_act": "silu", "moe_intermediate_size": 4096,
                    "num_local_experts": 256, "num_experts_per_tok": 8, "routed_scaling_factor": 1.0,
                    "moe_hidden_size": 4096,
                }),
                inside=(Part("muse_spark"),),
            ),
        ),
        router=_ALWAYS
        | {
            "renormalize_epsilon": 1e-15,
            "routed_scaling_factor": SCALE,
            "logit_multiplier": key(".output_multiplier", "output_multiplier", kind="number"),
        },
        layer={
            "latent": {"size": key("moe_hidden_size", kind="int"), "norm_epsilon": RMS_EPSILON},
            "expert_norm": {"epsilon": key("post_norm_eps", kind="number"), "scale": "before"},
        },
        live=LiveBlock(
            tensors={
                "latent.input": same("pre_expert_proj.weight"),
                "latent.input_norm": same("pre_expert_norm.weight", form="one plus"),
                "latent.output": same("post_expert_proj.weight"),
                "expert_norm": same("experts.post_expert_norm.weight", form="one plus, expand to experts"),
            }
        ),
    ),
    Family(
        models=(
            ModelType(
                "inkling_text", ("InklingMoE",),
                (
                    TensorNames(
                        "inkling", "mlp",
                        (
                            *_W13, _INKLING_SCALE,
                            Entry(("shared", "gate_up"), "shared_experts.shared_w13_weight", "N (M B) H"),
                            Entry(("shared", "down"), "shared_experts.shared_w2_weight", "N H M"),
                        ),
                    ),
                    TensorNames(  # as transformers saves the text model alone
                        "inkling fused", "mlp",
                        (
                            *FUSED, *router("gate.weight", "gate.e_score_correction_bias"), _INKLING_SCALE,
                            Entry(("shared", "gate_up"), "shared_experts.gate_proj", "N M H", (("B", 0),)),
                            Entry(("shared", "gate_up"), "shared_experts.up_proj", "N M H", (("B", 1),)),
                            Entry(("shared", "down"), "shared_experts.down_proj", "N H M"),
                        ),
                    ),
                ),
                ConfigClass({
                    "hidden_size": 6144, "intermediate_size": 24576, "hidden_act": "silu",
                    "moe_intermediate_size": 3072, "n_routed_experts": 256, "num_experts_per_tok": 6,
                    "n_shared_experts": 2, "route_scale": 8.0,
                }, renamed=LOCAL_IS_ROUTED, older=config_class.width_of_experts),
                inside=(Part("inkling"), Part("inkling_mm_model")),
            ),
        ),
        router=_INKLING_MOE,
        shared=Shared(gate="router", count=NUM_SHARED),
        live=LiveBlock(
            tensors={
                "router.expert_scale": same("gate.global_scale", form="expand to logits"),
                "shared.gate_up": made("stacked gates and ups", "shared_experts.gate_proj", "shared_experts.up_proj"),
                "shared.down": made("stacked downs", "shared_experts.down_proj"),
            }
        ),
    ),
    Family(
        models=(
            ModelType(
                "inkling2_text", ("Inkling2SparseMoeBlock",), (TensorNames("inkling2", "mlp", _W13),),
                ConfigClass(
                    {
                        "hidden_size": 4608, "moe_intermediate_size": 2304, "n_routed_experts": 384,
                        "num_experts_per_tok": 8, "route_scale": 8.0, "mlp_gate_softcap": 4.0, "mlp_up_softcap": 25.0,
                        "scoring_func": "sigmoid",
                    },
                    renamed=LOCAL_IS_ROUTED
                    | {"intermediate_size": "moe_intermediate_size", "routed_scaling_factor": "route_scale"},
                ),
                inside=(Part("inkling2"),),
            ),
        ),
        router=_INKLING_MOE | {"scoring": key("scoring_func", values=SCORINGS), "renormalize_epsilon": 1e-20},
        activation={
            "function": "situ",
            "gate_cap": key("mlp_gate_softcap", kind="number"),
            "up_cap": key("mlp_up_softcap", kind="number"),
        },
    ),
    Family(
        models=(
            ModelType(
                "llama4_text", ("Llama4TextMoe",),
                (
                    TensorNames(
                        "llama4", "feed_forward",
                        TRANSPOSED + router("router.weight") + shared("shared_expert"),
                        also_split=True,
                    ),
                ),
                ConfigClass({
                    "hidden_size": 5120, "intermediate_size": 8192, "hidden_act": "silu", "num_experts_per_tok": 1,
                    "num_local_experts": 16,
                }),
                inside=(Part("llama4"),),
            ),
        ),
        router={
            "scoring": "sigmoid",
            "scoring_order": "after_top_k",
            "renormalize": False,
            "weight_on": "input",
            "gate_dtype": "input",
        },
        shared=Shared(width=WIDTH_OF_SHARED),
        layer={"weight_layout": "in_out"},
        intermediate_size=WIDTH,
        live=LiveBlock(router="router", logits_at=1, returns="flat y, logits"),
    ),
)  # fmt: skip
