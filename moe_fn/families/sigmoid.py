"""Families whose router is a sigmoid: with groups (C), and without (D)."""

from moe_fn.families.row import (
    ACT,
    ACTIVATIONS,
    CLAMPED,
    HIDDEN,
    LIMIT,
    NORM_TOP_K,
    NUM_SHARED,
    OAI,
    PLAIN,
    SCALE,
    SHARED_BY_SIZE,
    SILU,
    WIDTH,
    Family,
    Shared,
)  # fmt: skip
from moe_fn.families.words import Positive, Times, Word, word

_GROUPS = {
    "count": word(".num_group", "n_group", "num_expert_group", default=1),
    "top_k": word(".topk_group", "topk_group", default=1),
    "score": "top2_sum",
}
_BIASED = {"scoring": "sigmoid", "correction_bias": "scores"}
_FLAG = Word(NORM_TOP_K.names, True)
# DeepSeek-V3: sigmoid, bias for the choice, groups by their two best, renormalised, scaled.
_V3 = _BIASED | {"groups": _GROUPS, "renormalize": _FLAG, "renormalize_epsilon": 1e-20, "routed_scaling_factor": SCALE}

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
            "glm4v_moe",
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
        ("dots3_note_text", "dots3_note"),
        ("Dots3NoteTextMoE",),
        _V3,
        shared=Shared(width=Times(word("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), NUM_SHARED)),
    ),
    Family(("axk1",), ("AXK1MoE",), _V3, shared=Shared(), layer={"norms": {"epsilon": word("rms_norm_eps", default=1e-6), "output": True}}),
    Family(("axk2",), ("AXK2MoE",), _V3 | {"groups": _GROUPS | {"fill": "zero"}}, shared=Shared()),
    Family(("beam",), ("BeamMoE",), _V3 | {"scale_on": "output"}),
    Family(("glm5_next_text", "glm5_next"), ("Glm5NextTextMoE",), _V3, _SILU_CLAMPED, shared=Shared(activation=CLAMPED)),
    Family(("hy_v4",), ("HYV4MoE",), _V3, _SILU_CLAMPED, shared=Shared(activation=PLAIN)),
    Family(
        ("nemotron_h",),
        ("NemotronHMoE",),
        _V3,
        {"act": word(".act_fn", "mlp_hidden_act", default="relu2", values=ACTIVATIONS), "gated": False},
        shared=Shared(width=word("moe_shared_expert_intermediate_size", default=0)),
        layer={"latent": {"size": word("moe_latent_size", default=None)}},
    ),
)

_ALWAYS = _BIASED | {"renormalize": True}
_STEP_LIMIT = Positive(word(".limit", "swiglu_limits", default=None))
_STEP_SHARED_LIMIT = Positive(word(".limit", "swiglu_limits_shared", default=None))
_INKLING_MOE = {"scoring": "sigmoid", "correction_bias": "scores", "renormalize": True, "routed_scaling_factor": SCALE}

WITHOUT_GROUPS: tuple[Family, ...] = (
    Family(("minimax_m2",), ("MiniMaxM2SparseMoeBlock",), _ALWAYS | {"gate_dtype": "input"}),
    Family(
        ("minimax_m3_vl_text", "minimax_m3_vl"),
        ("MiniMaxM3VLSparseMoeBlock",),
        _ALWAYS | {"gate_dtype": "input", "routed_scaling_factor": SCALE, "scale_on": "output"},
        OAI,
        shared=Shared(width=word("shared_intermediate_size", default=0)),
        intermediate_size=WIDTH,
    ),
    Family(
        ("step3p5", "step3p7"),
        ("Step3p7SparseMoeBlock",),
        _ALWAYS | {"gate_dtype": "input", "routed_scaling_factor": SCALE, "scale_on": "output"},
        {"act": ACT, "limit": _STEP_LIMIT, "limit_at": "output"},
        shared=Shared(
            width=word("share_expert_dim", "share_expert_dims", default=0),
            activation={"act": ACT, "limit": _STEP_SHARED_LIMIT, "limit_at": "output"},
        ),
    ),
    Family(
        ("laguna",),
        ("LagunaSparseMoeBlock",),
        _ALWAYS
        | {
            "gate_dtype": "input",
            "logit_softcap": Positive(word(".router_logit_softcapping", "moe_router_logit_softcapping", default=0.0)),
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
    Family(("hy_v3",), ("HYV3MoE",), _ALWAYS | {"renormalize_epsilon": 1e-20, "routed_scaling_factor": SCALE}, shared=Shared()),
    Family(
        ("dots3_note_vision_encoder",),
        ("Dots3NoteVisionMoE",),
        _ALWAYS | {"renormalize_epsilon": 1e-20, "routed_scaling_factor": SCALE},
    ),
    Family(("flint",), ("FlintSparseMoeBlock",), {"scoring": "sigmoid", "renormalize": _FLAG}, shared=Shared(width=SHARED_BY_SIZE)),
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
            "correction_bias": word(".use_expert_bias", "use_expert_bias", default=True, values={True: "scores", False: "none"}),
            "renormalize": _FLAG,
            "renormalize_epsilon": 1e-6,
            "routed_scaling_factor": SCALE,
            "gate_dtype": "input",
            "score_dtype": "input",
        },
    ),
    Family(
        ("muse_spark_text", "muse_spark"),
        ("MuseSparkMoE",),
        _ALWAYS
        | {
            "renormalize_epsilon": 1e-15,
            "routed_scaling_factor": SCALE,
            "logit_multiplier": word(".output_multiplier", "output_multiplier"),
        },
        layer={
            "latent": {"size": word("moe_hidden_size"), "norm_epsilon": word("rms_norm_eps", default=1e-6)},
            "expert_norm": {"epsilon": word("post_norm_eps", "rms_norm_eps", default=1e-6), "scale": "before"},
        },
    ),
    Family(
        ("inkling_text", "inkling", "inkling_mm_model"),
        ("InklingMoE",),
        _INKLING_MOE,
        shared=Shared(gate="router", count=NUM_SHARED),
    ),
    Family(
        ("inkling2_text", "inkling2"),
        ("Inkling2SparseMoeBlock",),
        _INKLING_MOE | {"scoring": word("scoring_func", default="sigmoid"), "renormalize_epsilon": 1e-20},
        {"function": "situ", "gate_cap": word("mlp_gate_softcap"), "up_cap": word("mlp_up_softcap")},
    ),
    Family(
        ("llama4_text", "llama4"),
        ("Llama4TextMoe",),
        {"scoring": "sigmoid", "scoring_order": "after_top_k", "renormalize": False, "weight_on": "input", "gate_dtype": "input"},
        shared=Shared(width=WIDTH),
        layer={"weight_layout": "in_out"},
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
    ),
)
