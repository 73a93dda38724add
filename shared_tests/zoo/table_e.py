"""Table E: hash routing, sparsemixer, capacities, and blocks that are not token-choice Mixtures of Experts."""

from dataclasses import replace

from shared_tests.zoo.tables import MIXTRAL, ROW, family, twins

_V4 = {
    "hidden_size": 32,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "mlp_layer_types": ["hash_moe", "moe"],
    "vocab_size": 50,
}
_LIMIT = {"swiglu_limit": 0.4, "routed_scaling_factor": 2.5}
_DROPS = "drops the tokens that do not fit an expert's capacity, which depends on the other tokens"

ROWS_E = (
    *family(
        "E",
        "deepseek_v4",
        "DeepseekV4Config",
        "DeepseekV4SparseMoeBlock",
        _V4,
        {"plain": {}, "limit-bites": _LIMIT, "sigmoid": {"scoring_func": "sigmoid"}, "gelu": {"hidden_act": "gelu"}},
        replace(ROW, args=(1,)),
    ),
    *family(
        "E",
        "deepseek_v4",
        "DeepseekV4Config",
        "DeepseekV4SparseMoeBlock",
        _V4,
        {"hash": {}, "hash-limit-bites": _LIMIT, "hash-sigmoid": {"scoring_func": "sigmoid"}},
        replace(ROW, args=(0,), takes="input_ids"),
    ),
    *family(
        "E",
        "phimoe",
        "PhimoeConfig",
        "PhimoeSparseMoeBlock",
        MIXTRAL,
        {"plain": {}, "wide-threshold": {"router_jitter_noise": 0.3}, "no-threshold": {"router_jitter_noise": 0.0}},
        replace(ROW, router="router"),
    ),
    *family(
        "E",
        "switch_transformers",
        "SwitchTransformersConfig",
        "SwitchTransformersSparseMLP",
        {"d_model": 32, "d_ff": 24, "num_experts": 8},
        {"capacity": {"expert_capacity": 3}, "router-bias": {"expert_capacity": 3, "router_bias": True}},
        replace(ROW, routing="none", refused=_DROPS),
    ),
    *family(
        "E",
        "nllb_moe",
        "NllbMoeConfig",
        "NllbMoeSparseMLP",
        {"d_model": 32, "num_experts": 8},
        {"capacity": {"expert_capacity": 3}},
        replace(ROW, args=(24,), routing="none", refused=_DROPS),
    ),
    *twins(
        family(
            "E",
            "doge",
            "DogeConfig",
            "DogeCDMoE",
            {"hidden_size": 32, "intermediate_size": 24, "num_experts": 16, "num_experts_per_tok": 3},
            {"not-normalised": {"norm_topk_prob": False}, "normalised": {"norm_topk_prob": True}},
            replace(ROW, routing="none", refused="retrieves rank-1 experts by product keys (PEER), with a dense MLP"),
        ),
        {"normalised": "not-normalised"},  # a softmax over the chosen sums to 1 already
    ),
    *family(
        "E",
        "vitpose_backbone",
        "VitPoseBackboneConfig",
        "VitPoseBackboneMoeMLP",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "mlp_ratio": 2,
            "num_experts": 6,
            "part_features": 8,
            "num_hidden_layers": 2,
        },
        {"heads": {}},
        replace(
            ROW,
            routing="none",
            takes="heads",
            refused="one linear head for each data set, without a router",
        ),
    ),
)
