"""Every published layout as a row of data: which names, which axes. Read from transformers 5.23's conversions and its
models' own names.

Where one family has several rows (experts one by one, or fused), the names in the file decide.
"""

import dataclasses

from moe_fn.checkpoint.layout import Entry, Layout, fused, latent, per_expert, router, shared, ungated, ungated_shared

_EACH = per_expert("gate_proj", "up_proj", "down_proj")
_W132 = per_expert("w1", "w3", "w2")
_SHARED_W132 = shared(gate="w1", up="w3", down="w2")
_FUSED = fused("experts.gate_up_proj", "experts.down_proj")
_TRANSPOSED = fused("experts.gate_up_proj", "experts.down_proj", transposed=True)
_INTERLEAVED = fused("experts.gate_up_proj", "experts.down_proj", "I G", transposed=True)
_W13 = fused("experts.w13_weight", "experts.w2_weight", "I G")
_STACKED = fused("input_linear.weight", "output_linear.weight")
_FUSED_BIASES = {
    rows: (
        Entry(("gate_up_bias",), "experts.gate_up_proj_bias", f"E ({rows})"),
        Entry(("down_bias",), "experts.down_proj_bias", "E X"),
    )
    for rows in ("G I", "I G")
}
_QWEN = router("gate.weight") + shared("shared_expert", sigmoid="shared_expert_gate.weight")
_QWEN_FAMILIES = (
    "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "flex_olmo", "mellum", "flint", "qwen3_5_moe", "qwen3_5_moe_text",
    "qwen4_exp",
    "qwen4_exp_text", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_talker_text", "qwen3_vl_moe",
    "qwen3_vl_moe_text",
)  # fmt: skip
_V3 = router("gate.weight", "gate.e_score_correction_bias") + shared()
_V3_FAMILIES = (
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "glm4_moe", "glm4_moe_lite", "glm4v_moe",
    "glm4v_moe_text",
    "glm_moe_dsa", "glm5_next", "glm5_next_text", "dots1", "dots3_note", "dots3_note_text", "solar_open", "axk2",
    "mimo_v2_flash",
    "beam", "cohere2_moe", "exaone_moe", "deepseek_ocr2", "deepseek_ocr2_text", "unlimited_ocr", "unlimited_ocr_text",
    "mistral4", "hy_v4",
)  # fmt: skip
_CLASSIFIER = (
    *router("router.classifier.weight"),
    Entry(("router", "bias"), "router.classifier.bias", "C", optional=True),
)
_GATE_ON_LAYER = ("experts.", "gate.", "shared_experts.")
_MUSE_NORM = Entry(("expert_norm",), "experts.post_expert_norm.weight", "X", offset=1.0)
# one for the block: weights sum to one, so it is the same one for every expert
_JET_BIAS = Entry(("down_bias",), "bias", "X")
_STEP = (
    Entry(("gate_up",), "gate_proj.weight", "E I X", (("G", 0),)),
    Entry(("gate_up",), "up_proj.weight", "E I X", (("G", 1),)),
    Entry(("down",), "down_proj.weight", "E X I"),
)
_DBRX = (
    Entry(("gate_up",), "experts.mlp.w1", "(E I) X", (("G", 0),)),
    Entry(("gate_up",), "experts.mlp.v1", "(E I) X", (("G", 1),)),
    Entry(("down",), "experts.mlp.w2", "(E I) X"),
)
_INKLING_SCALE = Entry(("router", "expert_scale"), "gate.global_scale", "1")
_INKLING = (
    _INKLING_SCALE,
    Entry(("shared", "gate_up"), "shared_experts.shared_w13_weight", "N (M B) H"),
    Entry(("shared", "down"), "shared_experts.shared_w2_weight", "N H M"),
)


_GEMMA_FAMILIES = ("gemma4", "gemma4_text", "diffusion_gemma", "diffusion_gemma_text")


def _gemma(experts: tuple[Entry, ...], scale: str = "router.per_expert_scale") -> tuple[Entry, ...]:
    return (
        *experts,
        Entry(("router", "gate"), "router.proj.weight", "C W"),
        Entry(("router", "gate"), "router.scale", "W", scales=True),
        Entry(("router", "expert_scale"), scale, "C"),
        Entry(("input_norm",), "pre_feedforward_layernorm_2.weight", "H"),
        Entry(("output_norm",), "post_feedforward_layernorm_2.weight", "H"),
    )


def _one_by_one(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """As tools that quantize take experts apart (llm-compressor, ModelOpt), with their biases if they have any; the
    rest as it was.
    """
    of_experts = {("gate_up",), ("down",), ("gate_up_bias",), ("down_bias",)}
    biases = (
        Entry(("gate_up_bias",), "experts.{e}.gate_proj.bias", "I", (("G", 0),)),
        Entry(("gate_up_bias",), "experts.{e}.up_proj.bias", "I", (("G", 1),)),
        Entry(("down_bias",), "experts.{e}.down_proj.bias", "X"),
    )
    has_biases = any(entry.weight == ("down_bias",) for entry in entries)
    return _EACH + (biases if has_biases else ()) + tuple(entry for entry in entries if entry.weight not in of_experts)


def _ernie_bank(bank: int, expert: str, gate: str) -> tuple[Entry, ...]:
    """Two banks of experts below one prefix: those of text, then as many for images, with gates that lie transposed."""
    correction = Entry(("router", "correction_bias"), "moe_statics.e_score_correction_bias", "T D", (("T", bank),))
    return (
        *per_expert("gate_proj", "up_proj", "down_proj", f"experts.{{{expert}}}."),
        Entry(("router", "gate"), gate, "W C"),
        correction,
    )


def _others_of_bank(expert: str) -> tuple[str, ...]:
    return tuple(f"experts.{{{expert}}}.{name}_proj.weight" for name in ("gate", "up", "down"))


_PUBLISHED: tuple[Layout, ...] = (
    Layout("qwen", _QWEN_FAMILIES, "mlp", _EACH + _QWEN),
    Layout("qwen fused", _QWEN_FAMILIES, "mlp", _FUSED + _QWEN),
    Layout("qwen fused, transposed", _QWEN_FAMILIES, "mlp", _TRANSPOSED + _QWEN),
    Layout("deepseek", _V3_FAMILIES, "mlp", _EACH + _V3),
    Layout("axk1", ("axk1",), "mlp", (*_EACH, *_V3, Entry(("output_norm",), "../post_mlp_layernorm.weight", "H"))),
    Layout("gemma4", _GEMMA_FAMILIES, "", _gemma(_FUSED), owned=("experts.", "router.")),
    *(
        Layout(name, _GEMMA_FAMILIES, "", _gemma(per_expert("gate_proj", "up_proj", "down_proj", "moe.experts.{e}."),
        scale),
               owned=("moe.", "router."))
        for name, scale in (("gemma4 moe", "router.per_expert_scale"), ("gemma4 moe, its scale",
        "moe.per_expert_scale"))
    ),
    Layout("deepseek fused", _V3_FAMILIES, "mlp", _FUSED + _V3),
    Layout("exaone", ("exaone_moe",), "mlp", _EACH + router("gate.weight", "e_score_correction_bias") + shared()),
    Layout(
        "hy_v4", ("hy_v4",), "mlp", _FUSED + router("gate.weight",
        "gate.e_score_correction_bias") + shared(gate="linear_gate"),
    ),
    Layout("afmoe", ("afmoe",), "mlp", _EACH + router("router.gate.weight", "expert_bias") + shared()),
    Layout("hy_v3", ("hy_v3",), "mlp", _EACH + router("router.gate.weight", "expert_bias") + shared("shared_mlp")),
    Layout("bailing", ("bailing_hybrid",), "mlp", _EACH + router("gate.weight", "gate.expert_bias") + shared()),
    Layout("kolibri", ("kolibri1",), "mlp", _EACH + router("gate.weight", "../moe.router.expert_bias") + shared()),
    Layout("laguna", ("laguna",), "mlp", _EACH + router("gate.weight",
    "experts.e_score_correction_bias") + shared("shared_expert")),
    Layout(
        "ernie4_5", ("ernie4_5_moe",), "mlp",
        _EACH + router("gate.weight") + shared()
        + (Entry(("router", "correction_bias"), "moe_statics.e_score_correction_bias", "1 D"),),
    ),
    Layout(
        "ernie4_5_vl, text", ("ernie4_5_vl_moe", "ernie4_5_vl_moe_text", "ernie4_5_vl_moe_bank"), "mlp",
        _ernie_bank(0, "e", "gate.weight") + shared(),
        others=(*_others_of_bank("second"), "gate.weight_1", "shared_experts.*"),
    ),
    Layout(
        "ernie4_5_vl, images", ("ernie4_5_vl_moe_bank",), "mlp", _ernie_bank(1, "second", "gate.weight_1"),
        others=(*_others_of_bank("e"), "gate.weight", "shared_experts.*"),
    ),
    Layout(
        "longcat", ("longcat_flash",), "mlp", _EACH + router("router.classifier.weight",
        "router.e_score_correction_bias"),
        others=("experts.{z}.gate_proj.weight", "experts.{z}.up_proj.weight", "router.classifier.bias"),
    ),
    Layout("hunyuan", ("hunyuan_v1_moe",), "mlp", _EACH + router("gate.wg.weight") + shared("shared_mlp")),
    Layout("jamba", ("jamba",), "feed_forward", _EACH + router("router.weight")),
    Layout(
        "mixtral", ("mixtral", "minimax", "minimax_m2", "phimoe", "minimax_m3_vl", "minimax_m3_vl_text"),
        "block_sparse_moe",
        _W132 + router("gate.weight", "e_score_correction_bias") + shared(),
    ),
    Layout(  # what transformers saves of the text model alone
        "minimax_m3 fused", ("minimax_m3_vl", "minimax_m3_vl_text"), "mlp",
        (
            *_FUSED, *router("gate.weight", "gate.e_score_correction_bias"),
            Entry(("shared", "gate_up"), "shared_experts.gate_up_proj.weight", "(B N M) H"),
            Entry(("shared", "down"), "shared_experts.down_proj.weight", "H (N M)"),
        ),
    ),
    Layout("kimi_linear", ("kimi_linear",), "block_sparse_moe", _W132 + _V3),
    Layout("lfm2", ("lfm2_moe",), "feed_forward", _W132 + router("gate.weight", "expert_bias")),
    Layout(
        "deepseek_v4", ("deepseek_v4",), "ffn", _W132 + router("gate.weight", "gate.bias",
        ids="gate.tid2eid") + _SHARED_W132,
    ),
    Layout(
        "mistral_large4", ("mistral_large4", "mistral_large4_text"), "", _W132 + router("gate.weight") + _SHARED_W132,
        owned=_GATE_ON_LAYER,
    ),
    Layout(
        "nemotron_h", ("nemotron_h",), "mixer",
        ungated("up_proj", "down_proj") + router("gate.weight", "gate.e_score_correction_bias")
        + ungated_shared("shared_experts", "up_proj", "down_proj") + latent("fc1_latent_proj", "fc2_latent_proj"),
    ),
    Layout("gpt_oss", ("gpt_oss",), "mlp", _INTERLEAVED + _FUSED_BIASES["I G"] + router("router.weight",
    bias="router.bias")),
    Layout(
        "openai_privacy_filter", ("openai_privacy_filter",), "mlp",
        _TRANSPOSED + _FUSED_BIASES["G I"] + router("router.weight", bias="router.bias"),
    ),
    Layout("llama4", ("llama4", "llama4_text"), "feed_forward",
    _TRANSPOSED + router("router.weight") + shared("shared_expert")),
    Layout(
        "aria", ("aria", "aria_text"), "mlp",
        fused("experts.fc1.weight", "experts.fc2.weight", transposed=True) + router("router.weight") + shared(),
    ),
    Layout(
        "granite", ("granitemoe", "granitemoeshared", "granitemoehybrid"), "block_sparse_moe",
        _STACKED + router("router.layer.weight"),
    ),
    Layout(
        "granite fused", ("granitemoe_swa", "granitemoe", "granitemoeshared", "granitemoehybrid"), "block_sparse_moe",
        _FUSED + router("router.weight"),
    ),
    Layout("jetmoe", ("jetmoe",), "mlp", (*_STACKED, *router("router.layer.weight"), _JET_BIAS)),
    Layout("dbrx", ("dbrx",), "ffn", _DBRX + router("router.layer.weight")),
    Layout(
        "step3", ("step3p5", "step3p7"), "moe", _STEP + router("gate.weight",
        "router_bias") + shared("../share_expert"),
        owned=("", "../share_expert."),
    ),
    Layout(
        "inkling", ("inkling", "inkling_text", "inkling_mm_model"), "mlp",
        _W13 + router("gate.weight", "gate.bias") + _INKLING,
    ),
    Layout(  # what transformers saves of the text model alone
        "inkling fused", ("inkling", "inkling_text", "inkling_mm_model"), "mlp",
        (
            *_FUSED, *router("gate.weight", "gate.e_score_correction_bias"), _INKLING_SCALE,
            Entry(("shared", "gate_up"), "shared_experts.gate_proj", "N M H", (("B", 0),)),
            Entry(("shared", "gate_up"), "shared_experts.up_proj", "N M H", (("B", 1),)),
            Entry(("shared", "down"), "shared_experts.down_proj", "N H M"),
        ),
    ),
    Layout("inkling2", ("inkling2", "inkling2_text"), "mlp", _W13 + router("gate.weight", "gate.bias")),
    Layout(
        "muse_spark", ("muse_spark", "muse_spark_text"), "mlp",
        (*_FUSED, *router("gate.weight", "gate.e_score_correction_bias"), _MUSE_NORM)
        + latent("pre_expert_proj", "post_expert_proj", "pre_expert_norm", offset=1.0),
    ),
    Layout(
        "zaya", ("zaya",), "mlp", (*_FUSED, Entry(("router", "correction_bias"), "gate.balancing_biases", "D")),
        others=("gate.down_proj.*", "gate.router_mlp.*", "gate.router_states_scale"),  # its router is the host's
    ),
    Layout(
        "dots3_note, images", ("dots3_note_vision_encoder",), "mlp",
        per_expert("fc1", "fc3", "fc2") + router("gate_weight", "router_bias"),
    ),
    Layout(
        "switch", ("switch_transformers",), "mlp", ungated("wi", "wo", "experts.expert_{e}.") + _CLASSIFIER,
    ),
    Layout(
        "nllb", ("nllb-moe", "nllb_moe"), "ffn", ungated("fc1", "fc2", "experts.expert_{e}.", bias=True) + _CLASSIFIER,
    ),
)  # fmt: skip

# Tools that quantize (llm-compressor, ModelOpt) take experts apart that a model keeps in one tensor, whatever the
# family.
_TAKEN_APART = (
    "gemma4", "granite", "granite fused", "llama4", "gpt_oss", "openai_privacy_filter", "aria", "hy_v4", "muse_spark",
    "zaya",
)  # fmt: skip
LAYOUTS = _PUBLISHED + tuple(
    dataclasses.replace(row, name=f"{row.name}, one by one", entries=_one_by_one(row.entries))
    for row in _PUBLISHED
    if row.name in _TAKEN_APART
)
