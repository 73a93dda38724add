"""Families whose router is a sigmoid: with groups (C), and without (D)."""

from moe_fn.families.row import (
    ACTIVATIONS,
    CLAMPED,
    HIDDEN,
    LIMIT,
    NORM_TOP_K,
    NUM_SHARED,
    OAI,
    PLAIN,
    SCALE,
    SCORINGS,
    SHARED_BY_SIZE,
    SILU,
    WIDTH,
    WIDTH_OF_SHARED,
    Family,
    Shared,
)  # fmt: skip
from moe_fn.families.words import Given, Limit, Times, word

_GROUP_COUNT = word(".num_group", "n_group", "num_expert_group", kind="whole")
_GROUPS = {
    "count": _GROUP_COUNT,
    "top_k": word(".topk_group", "topk_group", kind="whole"),
    "score": "top2_sum",
}
_BIASED = {"scoring": "sigmoid", "correction_bias": "scores"}
# DeepSeek-V3: sigmoid, bias for the choice, groups by their two best, renormalised, scaled.
_V3 = _BIASED | {
    "groups": _GROUPS,
    "renormalize": NORM_TOP_K,
    "renormalize_epsilon": 1e-20,
    "routed_scaling_factor": SCALE,
}

_RMS_EPSILON = word("rms_norm_eps", kind="number")
_LATENT_SIZE = word("moe_latent_size", kind="whole")
_SILU_CLAMPED = SILU | {"limit": LIMIT}  # whatever hidden_act says

WITH_GROUPS: tuple[Family, ...] = (
    Family(
        (
            "deepseek_v3",
            "deepseek_v32",
            "kimi_k2",
            "glm4_moe",
            "glm4_moe_lite",
            "glm4v_moe_text",
            "glm_moe_dsa",
            "dots1",
            "solar_open",
            "kimi_linear",
            "bailing_hybrid",
            "exaone_moe",
        ),
        (
            "DeepseekV3MoE",
            "DeepseekV32MoE",
            "Glm4MoeMoE",
            "Glm4MoeLiteMoE",
            "Glm4vMoeTextMoE",
            "GlmMoeDsaMoE",
            "Dots1MoE",
            "SolarOpenMoE",
            "KimiLinearMoE",
            "BailingHybridMoE",
            "ExaoneMoeSparseMoEBlock",
        ),
        _V3,
        shared=Shared(),
    ),
    Family(("mimo_v2_flash",), ("MiMoV2FlashMoE",), _V3),
    Family(
        ("dots3_note_text",),
        ("Dots3NoteTextMoE",),
        _V3,
        shared=Shared(width=Times(word("shared_experts_intermediate_size", kind="whole"), NUM_SHARED)),
    ),
    Family(("axk1",), ("AXK1MoE",), _V3, shared=Shared(), layer={"norms": {"epsilon": _RMS_EPSILON, "output": True}}),
    Family(
        ("axk2",),
        ("AXK2MoE",),
        _V3 | {"groups": Given(_GROUP_COUNT, _GROUPS | {"fill": "zero"}, None)},
        shared=Shared(),
    ),
    Family(("beam",), ("BeamMoE",), _V3 | {"scale_on": "output"}),
    Family(("glm5_next_text",), ("Glm5NextTextMoE",), _V3, _SILU_CLAMPED, shared=Shared(activation=CLAMPED)),
    Family(("hy_v4",), ("HYV4MoE",), _V3, _SILU_CLAMPED, shared=Shared(activation=PLAIN)),
    Family(
        ("nemotron_h",),
        ("NemotronHMoE",),
        _V3,
        {"act": word(".act_fn", "mlp_hidden_act", values=ACTIVATIONS), "gated": False},
        shared=Shared(width=word("moe_shared_expert_intermediate_size", kind="whole")),
        layer={"latent": Given(_LATENT_SIZE, {"size": _LATENT_SIZE}, None)},
    ),
)

_ALWAYS = _BIASED | {"renormalize": True}
_STEP_LIMIT = Limit(word(".limit", "swiglu_limits", kind="number"), zero_is_none=True)
_STEP_SHARED_LIMIT = Limit(word(".limit", "swiglu_limits_shared", kind="number"), zero_is_none=True)
_INKLING_MOE = {"scoring": "sigmoid", "correction_bias": "scores", "renormalize": True, "routed_scaling_factor": SCALE}

WITHOUT_GROUPS: tuple[Family, ...] = (
    Family(("minimax_m2",), ("MiniMaxM2SparseMoeBlock",), _ALWAYS | {"gate_dtype": "input"}),
    Family(
        ("minimax_m3_vl_text",),
        ("MiniMaxM3VLSparseMoeBlock",),
        _ALWAYS | {"gate_dtype": "input", "routed_scaling_factor": SCALE, "scale_on": "output"},
        OAI,
        shared=Shared(width=word("shared_intermediate_size", kind="whole")),
        intermediate_size=WIDTH,
    ),
    Family(
        ("step3p5",),
        ("Step3p7SparseMoeBlock",),
        _ALWAYS | {"gate_dtype": "input", "routed_scaling_factor": SCALE, "scale_on": "output"},
        SILU | {"limit": _STEP_LIMIT, "limit_at": "output"},
        shared=Shared(
            width=word("share_expert_dim", kind="whole"),
            activation=SILU | {"limit": _STEP_SHARED_LIMIT, "limit_at": "output"},
        ),
    ),
    Family(
        ("laguna",),
        ("LagunaSparseMoeBlock",),
        _ALWAYS
        | {
            "gate_dtype": "input",
            "logit_softcap": Limit(
                word(".router_logit_softcapping", "moe_router_logit_softcapping", kind="number"), zero_is_none=True
            ),
            "routed_scaling_factor": SCALE,
            "scale_on": "output",
        },
        shared=Shared(width=SHARED_BY_SIZE),
    ),
    Family(
        ("afmoe",),
        ("AfmoeSparseMoeBlock",),
        _ALWAYS | {"renormalize_epsilon": 1e-20, "routed_scaling_factor": SCALE, "gate_dtype": "input"},
        shared=Shared(),
    ),
    Family(
        ("hy_v3",),
        ("HYV3MoE",),
        _ALWAYS | {"renormalize_epsilon": 1e-20, "routed_scaling_factor": SCALE},
        shared=Shared(),
    ),
    Family(
        ("dots3_note_vision_encoder",),
        ("Dots3NoteVisionMoE",),
        _ALWAYS | {"renormalize_epsilon": 1e-20, "routed_scaling_factor": SCALE},
    ),
    Family(
        ("flint",),
        ("FlintSparseMoeBlock",),
        {"scoring": "sigmoid", "renormalize": NORM_TOP_K},
        shared=Shared(width=SHARED_BY_SIZE),
    ),
    Family(
        ("kolibri1",),
        ("Kolibri1SparseMoeBlock",),
        {"scoring": "sigmoid", "scoring_order": "after_top_k", "correction_bias": "logits", "renormalize": NORM_TOP_K},
        shared=Shared(width=SHARED_BY_SIZE),
    ),
    Family(
        ("lfm2_moe",),
        ("Lfm2MoeSparseMoeBlock",),
        {
            "scoring": "sigmoid",
            "correction_bias": word(".use_expert_bias", "use_expert_bias", values={True: "scores", False: "none"}),
            "renormalize": NORM_TOP_K,
            "renormalize_epsilon": 1e-6,
            "routed_scaling_factor": SCALE,
            "gate_dtype": "input",
            "score_dtype": "input",
        },
        SILU,
    ),
    Family(
        ("muse_spark_text",),
        ("MuseSparkMoE",),
        _ALWAYS
        | {
            "renormalize_epsilon": 1e-15,
            "routed_scaling_factor": SCALE,
            "logit_multiplier": word(".output_multiplier", "output_multiplier", kind="number"),
        },
        layer={
            "latent": {"size": word("moe_hidden_size", kind="whole"), "norm_epsilon": _RMS_EPSILON},
            "expert_norm": {"epsilon": word("post_norm_eps", kind="number"), "scale": "before"},
        },
    ),
    Family(
        ("inkling_text",),
        ("InklingMoE",),
        _INKLING_MOE,
        shared=Shared(gate="router", count=NUM_SHARED),
    ),
    Family(
        ("inkling2_text",),
        ("Inkling2SparseMoeBlock",),
        _INKLING_MOE | {"scoring": word("scoring_func", values=SCORINGS), "renormalize_epsilon": 1e-20},
        {
            "function": "situ",
            "gate_cap": word("mlp_gate_softcap", kind="number"),
            "up_cap": word("mlp_up_softcap", kind="number"),
        },
    ),
    Family(
        ("llama4_text",),
        ("Llama4TextMoe",),
        {
            "scoring": "sigmoid",
            "scoring_order": "after_top_k",
            "renormalize": False,
            "weight_on": "input",
            "gate_dtype": "input",
        },
        shared=Shared(width=WIDTH_OF_SHARED),
        layer={"weight_layout": "in_out"},
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
    ),
)
