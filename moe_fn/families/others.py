"""Families with routers of their own (E), and what is no token-choice mixture of feed-forward experts."""

from moe_fn.families.row import CLAMPED, SCALE, SCORINGS, WIDTH_OF_EXPERT, Family, Shared
from moe_fn.families.words import word

_V4_LAYER = (".is_hash", "mlp_layer_types")

OTHERS: tuple[Family, ...] = (
    Family(
        ("deepseek_v4",),
        ("DeepseekV4SparseMoeBlock",),
        {
            "scoring": word("scoring_func", values=SCORINGS),
            "selection": word(*_V4_LAYER, values={True: "hash", False: "top_k", "hash_moe": "hash", "moe": "top_k"}),
            "correction_bias": word(
                *_V4_LAYER, values={True: "none", False: "scores", "hash_moe": "none", "moe": "scores"}
            ),
            "renormalize_epsilon": 1e-20,
            "routed_scaling_factor": SCALE,
            "gate_dtype": "input",
            "score_dtype": "input",
        },
        CLAMPED,
        shared=Shared(width=WIDTH_OF_EXPERT),  # one, whatever n_shared_experts says
    ),
    Family(
        ("phimoe",),
        ("PhimoeSparseMoeBlock",),
        {
            "selection": "sparsemixer",
            "renormalize": False,
            "sparsemixer_epsilon": word(".router_jitter_noise", "router_jitter_noise", kind="number"),
            "gate_dtype": "input",
        },
    ),
    Family(
        ("switch_transformers",),
        ("SwitchTransformersSparseMLP",),
        {"renormalize": False, "capacity": word(".expert_capacity", "expert_capacity", kind="whole")},
        {
            "act": word(".act", "dense_act_fn", values={"relu": {"function": "relu"}, "gelu": {"function": "gelu"}}),
            "gated": False,
        },
        top_k=1,
        intermediate_size=word("d_ff"),
    ),
    Family(
        ("nllb-moe", "nllb_moe"),
        ("NllbMoeSparseMLP",),
        refused=(
            "transformers one-hots its 0/1 mask of first choices: every token goes to experts 0 and 1, and "
            "nothing is there to equal"
        ),
    ),
    Family(
        ("doge",),
        ("DogeCDMoE",),
        refused="product-key retrieval of rank-one experts (PEER), no router over feed-forward experts",
    ),
    Family(("jetmoe_attention",), ("JetMoeMoA",), refused="a mixture of attention heads, not of feed-forward experts"),
    Family(
        ("vitpose_backbone",),
        ("VitPoseBackboneMoeMLP", "VitPoseNaiveMoe"),
        refused="the data set that an image comes from picks the head: there is no router",
    ),
)
