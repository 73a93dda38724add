"""Families whose router is a softmax: before the top-k (A), and after it (B).

Defaults are those of transformers 5.23; a test compares them with the config classes.
"""

from dataclasses import replace

from moe_fn.families import config_class
from moe_fn.families.config_class import ConfigClass
from moe_fn.families.keys import MISSING, Given, key
from moe_fn.families.row import (
    ACT,
    ACTIVATIONS,
    LOCAL_IS_NUM,
    LOCAL_IS_ROUTED,
    NORM_TOP_K,
    NUM_IS_LOCAL,
    OAI,
    PLAIN,
    RMS_EPSILON,
    ROUTER,
    SCALE,
    SHARED_BY_SIZE,
    SILU,
    UNREAD,
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
    STACKED,
    TRANSPOSED,
    W132,
    Entry,
    TensorNames,
    fused,
    fused_biases,
    per_expert,
    router,
    shared,
)

_FLAG = {"renormalize": NORM_TOP_K, "gate_dtype": "input"}
_ALWAYS = {"renormalize": True, "gate_dtype": "input"}
_NEVER = {"renormalize": False, "gate_dtype": "input"}
_GATED = Shared(width=SHARED_BY_SIZE, gate="sigmoid")

_GROUP_COUNT = key(".num_group", "n_group", kind="int")
_GROUP_TOP_K = key(".topk_group", "topk_group", kind="int")

# Mixtral and MiniMax
_MIXTRAL = ConfigClass({
    "hidden_size": 4096, "intermediate_size": 14336, "hidden_act": "silu", "num_experts_per_tok": 2,
    "num_local_experts": 8,
}, renamed=NUM_IS_LOCAL)  # fmt: skip
# Qwen3-Next and Qwen4
_QWEN3_NEXT = ConfigClass({
    "hidden_size": 2048, "hidden_act": "silu", "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 10, "num_experts": 512, "norm_topk_prob": True,
})  # fmt: skip

# Ernie 4.5: a model with images has two banks of experts below one prefix, text first; the gates are transposed.
_ERNIE = {"correction_bias": "scores", "renormalize_minimum": key(".norm_min", "moe_norm_min", kind="number")}
_ERNIE_NAMES = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}
_ERNIE_BIAS = Entry(("router", "correction_bias"), "moe_statics.e_score_correction_bias", "1 D")
_TEXT_EXPERTS, _IMAGE_EXPERTS = EACH, per_expert("gate_proj", "up_proj", "down_proj", "experts.{second}.")
_ERNIE_TEXT = TensorNames(
    "ernie4_5_vl, text", "mlp",
    (
        *_TEXT_EXPERTS, Entry(("router", "gate"), "gate.weight", "W C"),
        replace(_ERNIE_BIAS, axes="T D", pins=(("T", 0),)), *shared(),
    ),
    others=(*(entry.name for entry in _IMAGE_EXPERTS), "gate.weight_1", "shared_experts.*"),
)  # fmt: skip
_ERNIE_IMAGES = TensorNames(
    "ernie4_5_vl, images", "mlp",
    (
        *_IMAGE_EXPERTS, Entry(("router", "gate"), "gate.weight_1", "W C"),
        replace(_ERNIE_BIAS, axes="T D", pins=(("T", 1),)),
    ),
    others=(*(entry.name for entry in _TEXT_EXPERTS), "gate.weight", "shared_experts.*"),
)  # fmt: skip

# Gemma 4: the experts and two norms are tensors of the decoder layer.
_GEMMA_EACH = per_expert("gate_proj", "up_proj", "down_proj", "moe.experts.{e}.")
_GEMMA_GATE = (
    Entry(("router", "gate"), "router.proj.weight", "C W"),
    Entry(("router", "gate"), "router.scale", "W", scales=True),
)
_GEMMA_SCALE = Entry(("router", "expert_scale"), "router.per_expert_scale", "C")
_GEMMA_MOE_SCALE = Entry(("router", "expert_scale"), "moe.per_expert_scale", "C")
_GEMMA_NORMS = (
    Entry(("input_norm",), "pre_feedforward_layernorm_2.weight", "H"),
    Entry(("output_norm",), "post_feedforward_layernorm_2.weight", "H"),
)
_GEMMA = (
    TensorNames(
        "gemma4", "", (*FUSED, *_GEMMA_GATE, _GEMMA_SCALE, *_GEMMA_NORMS),
        owned=("experts.", "router."), also_split=True,
    ),
    TensorNames(
        "gemma4 moe", "", (*_GEMMA_EACH, *_GEMMA_GATE, _GEMMA_SCALE, *_GEMMA_NORMS), owned=("moe.", "router.")
    ),
    TensorNames(
        "gemma4 moe, its scale", "", (*_GEMMA_EACH, *_GEMMA_GATE, _GEMMA_MOE_SCALE, *_GEMMA_NORMS),
        owned=("moe.", "router."),
    ),
)  # fmt: skip
_GEMMA_CONFIG = ConfigClass({
    "hidden_size": 2304, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-06, "num_experts": None,
    "top_k_experts": None, "moe_intermediate_size": None,
}, nullable=("num_experts", "top_k_experts", "moe_intermediate_size"))  # fmt: skip

# DeepSeek-V2: topk_method says whether experts are chosen in groups; norm_topk_prob is in its config and never read.
_V2 = {
    "renormalize": False,
    "routed_scaling_factor": SCALE,
    "groups": key(
        ".topk_method", "topk_method",
        values={
            "greedy": None,
            "group_limited_greedy": {
                "count": _GROUP_COUNT, "top_k": _GROUP_TOP_K, "score": "max", "fill": "zero",
            },
        },
    ),
}  # fmt: skip
_V2_NAMES = {"num_experts": "n_routed_experts"}
_V2_NULLABLE = ("n_group", "topk_group", "topk_method", "num_experts_per_tok")
_V2_CONFIG = ConfigClass({
    "hidden_size": 4096, "hidden_act": "silu", "n_group": None, "n_routed_experts": 64, "n_shared_experts": 2,
    "routed_scaling_factor": 1.0, "topk_group": None, "topk_method": "greedy", "num_experts_per_tok": None,
    "moe_intermediate_size": 1407,
}, renamed=_V2_NAMES, nullable=_V2_NULLABLE)  # fmt: skip

_MISTRAL = {
    "renormalize_epsilon": 1e-20,
    "routed_scaling_factor": SCALE,
    "groups": {"count": _GROUP_COUNT, "top_k": _GROUP_TOP_K, "score": "top2_sum", "fill": "zero"},
}
_DBRX_NORM = key(".moe_normalize_expert_weights", "moe_normalize_expert_weights", kind="number")

BEFORE_TOP_K: tuple[Family, ...] = (
    Family(
        models=(
            ModelType("mixtral", ("MixtralSparseMoeBlock",), MIXTRAL, _MIXTRAL),
            ModelType("minimax", ("MiniMaxSparseMoeBlock",), MIXTRAL, _MIXTRAL),
        ),
        router=_ALWAYS,
    ),
    Family(
        models=(ModelType("qwen2_moe", ("Qwen2MoeSparseMoeBlock",), QWEN, ConfigClass({
            "hidden_size": 2048, "hidden_act": "silu", "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60,
            "norm_topk_prob": False,
        })),),
        router=_FLAG,
        shared=_GATED,
    ),
    Family(
        models=(
            ModelType("qwen3_moe", ("Qwen3MoeSparseMoeBlock",), QWEN, ConfigClass({
                "hidden_size": 2048, "hidden_act": "silu", "moe_intermediate_size": 768, "num_experts_per_tok": 8,
                "num_experts": 128, "norm_topk_prob": False,
            }, renamed=NUM_IS_LOCAL)),
            ModelType("mellum", ("MellumSparseMoeBlock",), QWEN, ConfigClass({
                "hidden_size": 2304, "hidden_act": "silu", "moe_intermediate_size": 896, "num_experts_per_tok": 8,
                "num_experts": 64, "norm_topk_prob": True,
            }, renamed=NUM_IS_LOCAL)),
            ModelType("olmoe", ("OlmoeSparseMoeBlock",), QWEN, ConfigClass({
                "hidden_size": 2048, "intermediate_size": 2048, "hidden_act": "silu", "num_experts_per_tok": 8,
                "num_experts": 64, "norm_topk_prob": False,
            }, renamed=LOCAL_IS_NUM)),
            ModelType("flex_olmo", ("FlexOlmoSparseMoeBlock",), QWEN, ConfigClass({
                "hidden_size": 4096, "intermediate_size": 11008, "hidden_act": "silu", "num_experts_per_tok": 5,
                "num_experts": 7, "norm_topk_prob": False,
            }, renamed=LOCAL_IS_NUM)),
            ModelType(
                "qwen3_omni_moe_text", ("Qwen3OmniMoeThinkerTextSparseMoeBlock",), QWEN,
                ConfigClass({
                    "hidden_size": 2048, "hidden_act": "silu", "moe_intermediate_size": 768, "num_experts_per_tok": 8,
                    "num_experts": 128, "norm_topk_prob": True,
                }),
                inside=(
                    Part("qwen3_omni_moe", ("thinker_config", "text_config"), ("thinker",)),
                    Part("qwen3_omni_moe_thinker"),
                ),
            ),
        ),
        router=_FLAG,
    ),
    Family(
        models=(
            ModelType(
                "qwen3_vl_moe_text", ("Qwen3VLMoeTextSparseMoeBlock",), QWEN,
                ConfigClass({
                    "hidden_size": 2048, "hidden_act": "silu", "moe_intermediate_size": 1408, "num_experts_per_tok": 4,
                    "num_experts": 60,
                }, renamed=NUM_IS_LOCAL),
                inside=(Part("qwen3_vl_moe"),),
            ),
        ),
        router=_ALWAYS,
    ),
    Family(
        models=(
            ModelType("qwen3_next", ("Qwen3NextSparseMoeBlock",), QWEN, _QWEN3_NEXT),
            ModelType(
                "qwen4_exp_text", ("Qwen4ExpTextSparseMoeBlock",), QWEN, _QWEN3_NEXT, inside=(Part("qwen4_exp"),)
            ),
            ModelType(
                "qwen3_omni_moe_talker_text", ("Qwen3OmniMoeTalkerTextSparseMoeBlock",), QWEN,
                ConfigClass({
                    "hidden_size": 1024, "hidden_act": "silu", "moe_intermediate_size": 384, "num_experts_per_tok": 8,
                    "num_experts": 128, "norm_topk_prob": False, "shared_expert_intermediate_size": MISSING,
                }, renamed=NUM_IS_LOCAL),
                inside=(Part("qwen3_omni_moe", ("talker_config", "text_config"), ("talker",)),),
            ),
        ),
        router=_FLAG,
        shared=_GATED,
    ),
    Family(
        models=(
            ModelType(
                "qwen3_5_moe_text", ("Qwen3_5MoeSparseMoeBlock",), QWEN,
                ConfigClass({
                    "hidden_size": 2048, "hidden_act": "silu", "moe_intermediate_size": 512,
                    "shared_expert_intermediate_size": 512, "num_experts_per_tok": 8, "num_experts": 256,
                }),
                inside=(Part("qwen3_5_moe"),),
            ),
        ),
        router=_ALWAYS,
        shared=_GATED,
    ),
    Family(
        models=(
            ModelType(
                "jamba", ("JambaSparseMoeBlock",),
                (TensorNames("jamba", "feed_forward", EACH + router("router.weight")),),
                ConfigClass({
                    "hidden_size": 4096, "intermediate_size": 14336, "hidden_act": "silu", "num_experts_per_tok": 2,
                    "num_experts": 16,
                }, renamed=LOCAL_IS_NUM),
            ),
        ),
        router=_NEVER,
        live=ROUTER,
    ),
    Family(
        models=(
            ModelType(
                "hunyuan_v1_moe", ("HunYuanMoEV1Moe",),
                (TensorNames("hunyuan", "mlp", EACH + router("gate.wg.weight") + shared("shared_mlp")),),
                ConfigClass({
                    "hidden_size": 4096, "intermediate_size": 11008, "hidden_act": "silu", "num_experts": 1,
                    "moe_topk": 1,
                }, renamed={"num_experts_per_tok": "moe_topk"} | LOCAL_IS_NUM),
            ),
        ),
        router={"renormalize": True},
        shared=Shared(width=WIDTH_OF_SHARED),
        intermediate_size=WIDTH,
    ),
    Family(
        models=(
            ModelType(
                "ernie4_5_moe", ("Ernie4_5_MoeSparseMoeBlock",),
                (
                    TensorNames(
                        "ernie4_5", "mlp",
                        (*EACH, *router("gate.weight"), *shared(), _ERNIE_BIAS),
                    ),
                ),
                ConfigClass(
                    {
                        "hidden_size": 2560, "hidden_act": "silu", "moe_intermediate_size": 1536, "moe_k": 6,
                        "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_norm_min": 1e-12,
                    },
                    renamed=_ERNIE_NAMES,
                    nullable=("moe_k", "moe_num_experts", "moe_num_shared_experts", "moe_norm_min"),
                ),
            ),
        ),
        router=_ERNIE,
        shared=Shared(),
    ),
    Family(
        models=(
            ModelType(
                "ernie4_5_vl_moe_bank", ("Ernie4_5_VLMoeSparseMoeBlock",), (_ERNIE_TEXT, _ERNIE_IMAGES),
                ConfigClass(
                    {
                        "hidden_size": 2560, "hidden_act": "silu", "moe_intermediate_size": MISSING, "moe_k": 6,
                        "moe_num_experts": 64, "moe_norm_min": 1e-12,
                    },
                    renamed=_ERNIE_NAMES,
                    nullable=("moe_k", "moe_num_experts", "moe_norm_min"),
                ),
            ),
        ),
        router=_ERNIE,
        live=LiveBlock(returns="flat y, flat logits"),
    ),
    Family(
        models=(
            ModelType(
                "ernie4_5_vl_moe_text", ("Ernie4_5_VLMoeMoeBlock",), (_ERNIE_TEXT,), UNREAD,
                inside=(Part("ernie4_5_vl_moe"),),
            ),
        ),
        refused=(
            "two banks of experts of different sizes, one for text and one for images: "
            "use its text_moe and its vision_moe"
        ),
    ),
    Family(
        models=(
            ModelType(
                "gemma4_text", ("Gemma4TextDecoderLayer",), _GEMMA, _GEMMA_CONFIG,
                inside=(Part("gemma4"), Part("gemma4_assistant", chosen=True)),
            ),
            ModelType(
                "diffusion_gemma_text", ("DiffusionGemmaEncoderTextLayer", "DiffusionGemmaDecoderTextLayer"), _GEMMA,
                _GEMMA_CONFIG,
                inside=(Part("diffusion_gemma"),),
            ),
        ),
        router=_ALWAYS,
        layer={"norms": {"epsilon": RMS_EPSILON, "input": True, "gate": True, "output": True}},
        live=LiveBlock(
            router="router",
            is_layer=True,
            tensors={
                "router.gate": made("scaled gate", "router.proj.weight", "router.scale"),
                "router.expert_scale": same("router.per_expert_scale"),
                "input_norm": same("pre_feedforward_layernorm_2.weight"),
                "output_norm": same("post_feedforward_layernorm_2.weight"),
            },
        ),
    ),
    Family(
        models=(
            ModelType("deepseek_v2", ("DeepseekV2Moe",), DEEPSEEK, _V2_CONFIG),
            ModelType(
                "deepseek_ocr2_text", ("DeepseekOcr2TextMoe",), DEEPSEEK, _V2_CONFIG, inside=(Part("deepseek_ocr2"),)
            ),
            ModelType(
                "unlimited_ocr_text", ("UnlimitedOcrTextMoe",), DEEPSEEK,
                ConfigClass({
                    "hidden_size": 1280, "hidden_act": "silu", "n_group": 1, "n_routed_experts": 64,
                    "n_shared_experts": 2, "routed_scaling_factor": 1.0, "topk_group": 1, "topk_method": "greedy",
                    "num_experts_per_tok": 6, "moe_intermediate_size": 896,
                }, renamed=_V2_NAMES, nullable=_V2_NULLABLE),
                inside=(Part("unlimited_ocr"),),
            ),
        ),
        router=_V2,
        shared=Shared(),
    ),
    Family(
        models=(
            ModelType(
                "mistral4", ("Mistral4MoE",), DEEPSEEK,
                ConfigClass(
                    {
                        "hidden_size": 4096, "moe_intermediate_size": 2048, "n_shared_experts": 1,
                        "n_routed_experts": 128, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
                        "num_experts_per_tok": 4, "norm_topk_prob": True, "hidden_act": "silu",
                    },
                    renamed=LOCAL_IS_ROUTED,
                    nullable=("n_group", "topk_group", "num_experts_per_tok", "norm_topk_prob"),
                ),
            ),
        ),
        router=_MISTRAL | {"renormalize": NORM_TOP_K, "gate_dtype": "input", "score_dtype": "input"},
        shared=Shared(),
    ),
    Family(
        models=(
            ModelType(
                "mistral_large4_text", ("MistralLarge4TextMoE",),
                (
                    TensorNames(
                        "mistral_large4", "", W132 + router("gate.weight") + shared(gate="w1", up="w3", down="w2"),
                        owned=("experts.", "gate.", "shared_experts."),
                    ),
                ),
                ConfigClass({
                    "hidden_size": 6144, "moe_intermediate_size": 6144, "n_shared_experts": 1, "n_routed_experts": 128,
                    "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4,
                    "hidden_act": "silu",
                }, renamed=LOCAL_IS_ROUTED, older=config_class.number_of_experts),
                inside=(Part("mistral_large4"),),
            ),
        ),
        router=_MISTRAL,
        shared=Shared(),
    ),
    Family(
        models=(
            ModelType(
                "longcat_flash", ("LongcatFlashMoE",),
                (
                    TensorNames(
                        "longcat", "mlp", EACH + router("router.classifier.weight", "router.e_score_correction_bias"),
                        others=("experts.{z}.gate_proj.weight", "experts.{z}.up_proj.weight", "router.classifier.bias"),
                    ),
                ),
                ConfigClass(
                    {
                        "hidden_size": 6144, "hidden_act": "silu", "moe_topk": 12, "n_routed_experts": 512,
                        "zero_expert_num": 256, "expert_ffn_hidden_size": 2048, "routed_scaling_factor": 6.0,
                    },
                    renamed=LOCAL_IS_ROUTED
                    | {"num_experts_per_tok": "moe_topk", "moe_intermediate_size": "expert_ffn_hidden_size"},
                ),
            ),
        ),
        router={"correction_bias": "scores", "renormalize": False, "routed_scaling_factor": SCALE},
        layer={"zero_experts": {"count": key("zero_expert_num", kind="int")}},
        live=LiveBlock(
            router="router", tensors={"gate_up": same("experts.gate_up_proj", form="without zero experts")}
        ),
    ),
    Family(
        models=(
            ModelType(
                "zaya", ("ZayaSparseMoeBlock",),
                (
                    TensorNames(
                        "zaya", "mlp",
                        (*FUSED, Entry(("router", "correction_bias"), "gate.balancing_biases", "D")),
                        others=("gate.down_proj.*", "gate.router_mlp.*", "gate.router_states_scale"),  # its own router
                        also_split=True,
                    ),
                ),
                ConfigClass({
                    "hidden_size": 2048, "hidden_act": "silu", "moe_intermediate_size": 2048, "num_experts_per_tok": 1,
                    "num_experts": 16,
                }, older=config_class.one_expert),
            ),
        ),
        router={"correction_bias": "scores", "renormalize": False},
        layer={"zero_experts": {"count": 1, "kind": "zero"}},  # a choice that skips the experts
        # Its router is a network with a state: the caller passes its logits.
        live=LiveBlock(stateful=True, returns="y, states", tensors={"router.gate": ()}),
    ),
    Family(
        models=(
            ModelType(
                "dbrx", ("DbrxFFN",),
                (
                    TensorNames(
                        "dbrx", "ffn",
                        (
                            Entry(("gate_up",), "experts.mlp.w1", "(E I) X", (("G", 0),)),
                            Entry(("gate_up",), "experts.mlp.v1", "(E I) X", (("G", 1),)),
                            Entry(("down",), "experts.mlp.w2", "(E I) X"),
                            *router("router.layer.weight"),
                        ),
                    ),
                ),
                ConfigClass(
                    {
                        "d_model": 2048, "ffn_hidden_size": 3584, "moe_num_experts": 4, "moe_top_k": 1,
                        "moe_normalize_expert_weights": 1.0, "ffn_act_fn": "silu",
                    },
                    nullable=("moe_normalize_expert_weights",),
                    older=config_class.values_of_ffn_config,
                ),
            ),
        ),
        router={
            "renormalize": Given(_DBRX_NORM, True, False),
            "renormalize_order": Given(_DBRX_NORM, _DBRX_NORM, 1.0),
            "gate_dtype": "input",
            "score_dtype": "input",
        },
        activation={"act": key(".activation_fn", "ffn_act_fn", values=ACTIVATIONS)},
        live=LiveBlock(
            router="router",
            tensors={
                "gate_up": made("gates and ups of flat experts", "experts.mlp.w1", "experts.mlp.v1"),
                "down": made("in_out of flat experts", "experts.mlp.w2"),
            },
        ),
    ),
)  # fmt: skip

_AFTER = {"scoring_order": "after_top_k", "renormalize": False}
_OAI_BLOCK = LiveBlock(router="router", returns="y, weights")
_GRANITE_FUSED = TensorNames("granite fused", "block_sparse_moe", FUSED + router("router.weight"), also_split=True)
_GRANITE = (
    TensorNames("granite", "block_sparse_moe", STACKED + router("router.layer.weight"), also_split=True),
    _GRANITE_FUSED,
)
_GRANITE_CONFIG = ConfigClass({
    "hidden_size": 4096, "intermediate_size": 11008, "hidden_act": "silu", "num_local_experts": 8,
    "num_experts_per_tok": 2,
}, nullable=("num_local_experts", "num_experts_per_tok"))  # fmt: skip

AFTER_TOP_K: tuple[Family, ...] = (
    Family(
        models=(
            ModelType(
                "gpt_oss", ("GptOssMLP",),
                (
                    TensorNames(
                        "gpt_oss", "mlp",
                        fused("experts.gate_up_proj", "experts.down_proj", "I G", transposed=True)
                        + fused_biases("I G") + router("router.weight", bias="router.bias"),
                        also_split=True,
                    ),
                ),
                ConfigClass({
                    "num_local_experts": 128, "hidden_size": 2880, "intermediate_size": 2880, "num_experts_per_tok": 4,
                    "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
                }, renamed=NUM_IS_LOCAL),
            ),
        ),
        router=_AFTER | {"gate_dtype": "input", "score_dtype": "input"},
        activation=OAI,
        layer={"gate_up_layout": "interleaved", "weight_layout": "in_out"},
        live=_OAI_BLOCK,
    ),
    # It divides weights by top_k and multiplies the output by top_k.
    Family(
        models=(
            ModelType(
                "openai_privacy_filter", ("OpenAIPrivacyFilterMLP",),
                (
                    TensorNames(
                        "openai_privacy_filter", "mlp",
                        TRANSPOSED + fused_biases("G I") + router("router.weight", bias="router.bias"),
                        also_split=True,
                    ),
                ),
                ConfigClass({
                    "num_local_experts": 128, "hidden_size": 640, "intermediate_size": 640, "num_experts_per_tok": 4,
                    "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
                }, renamed=NUM_IS_LOCAL),
            ),
        ),
        router=_AFTER,
        activation=OAI,
        layer={"weight_layout": "in_out"},
        live=_OAI_BLOCK,
    ),
    Family(
        models=(
            ModelType("granitemoe", ("GraniteMoeMoE",), _GRANITE, _GRANITE_CONFIG),
            ModelType("granitemoe_swa", ("GraniteMoeSWAMoE",), (_GRANITE_FUSED,), _GRANITE_CONFIG),
            ModelType("granitemoeshared", ("GraniteMoeSharedMoE",), _GRANITE, _GRANITE_CONFIG),
            ModelType("granitemoehybrid", ("GraniteMoeHybridMoE",), _GRANITE, _GRANITE_CONFIG),
        ),
        router=_AFTER | {"gate_dtype": "input"},
        live=ROUTER,
    ),
    Family(
        models=(
            ModelType(
                "aria_text", ("AriaTextMoELayer",),
                (
                    TensorNames(
                        "aria", "mlp",
                        fused("experts.fc1.weight", "experts.fc2.weight", transposed=True)
                        + router("router.weight") + shared(),
                        also_split=True,
                    ),
                ),
                ConfigClass({
                    "hidden_size": 4096, "intermediate_size": 4096, "hidden_act": "silu", "moe_num_experts": 8,
                    "moe_topk": 2, "moe_num_shared_experts": 2,
                }),
                inside=(Part("aria"),),
            ),
        ),
        router=_AFTER | {"gate_dtype": "input", "score_dtype": "input"},
        activation=SILU,
        shared=Shared(activation=PLAIN),
        layer={"weight_layout": "in_out"},
        live=ROUTER,
    ),
    Family(
        models=(ModelType("cohere2_moe", ("Cohere2MoeSparseMoeBlock",), DEEPSEEK, ConfigClass({
            "hidden_size": 8192, "intermediate_size": 22528, "hidden_act": "silu", "num_experts_per_tok": 2,
            "num_experts": 8, "num_shared_experts": 0, "shared_expert_combination_strategy": "average",
            "expert_selection_fn": "softmax", "norm_topk_prob": True,
        })),),
        router={
            "scoring": key(
                ".expert_selection_fn", "expert_selection_fn", values={"softmax": "softmax", "sigmoid": "sigmoid"}
            ),
            "scoring_order": "after_top_k",
            "renormalize": key(
                ".expert_selection_fn", "expert_selection_fn", values={"softmax": False, "sigmoid": NORM_TOP_K}
            ),
            "gate_dtype": "input",
        },
        shared=Shared(combine=key("shared_expert_combination_strategy", values={"average": "average", "sum": "sum"})),
        intermediate_size=WIDTH,
    ),
    Family(
        models=(
            ModelType(
                "jetmoe", ("JetMoeMoE",),
                # The block adds one bias; as a bias of every expert it is the same: routing weights sum to one.
                (
                    TensorNames(
                        "jetmoe", "mlp", (*STACKED, *router("router.layer.weight"), Entry(("down_bias",), "bias", "X"))
                    ),
                ),
                ConfigClass({
                    "hidden_size": 2048, "intermediate_size": 5632, "activation_function": "silu",
                    "num_local_experts": 8, "num_experts_per_tok": 2,
                }),
            ),
        ),
        router=_AFTER | {"gate_dtype": "input"},
        activation={"act": ACT},
        live=LiveBlock(
            router="router",
            logits_at=4,
            tensors={
                "gate_up": same("input_linear.weight"),
                "down": same("output_linear.weight"),
                "down_bias": same("bias", form="expand to experts"),
            },
        ),
    ),
)  # fmt: skip
