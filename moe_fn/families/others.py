"""Families with routers of their own (E), and families that moe_fn refuses.

Defaults are those of transformers 5.23; a test compares them with the config classes.
"""

from moe_fn.families import config_class
from moe_fn.families.config_class import ConfigClass
from moe_fn.families.keys import key
from moe_fn.families.row import (
    CLAMPED,
    LOCAL_IS_ROUTED,
    ROUTER,
    SCALE,
    SCORINGS,
    UNREAD,
    WIDTH_OF_EXPERT,
    Family,
    LiveBlock,
    ModelType,
    Shared,
    made,
    same,
)
from moe_fn.families.tensor_names import MIXTRAL, W132, Entry, TensorNames, router, shared, ungated

_V4_LAYER = (".is_hash", "mlp_layer_types")
_CLASSIFIER = (
    *router("router.classifier.weight"),
    Entry(("router", "bias"), "router.classifier.bias", "C", optional=True),
)
_NLLB = (TensorNames("nllb", "ffn", ungated("fc1", "fc2", "experts.expert_{e}.", bias=True) + _CLASSIFIER),)

OTHERS: tuple[Family, ...] = (
    Family(
        models=(
            ModelType(
                "deepseek_v4", ("DeepseekV4SparseMoeBlock",),
                (
                    TensorNames(
                        "deepseek_v4", "ffn",
                        W132 + router("gate.weight", "gate.bias", ids="gate.tid2eid")
                        + shared(gate="w1", up="w3", down="w2"),
                    ),
                ),
                ConfigClass(
                    {
                        "hidden_size": 4096, "moe_intermediate_size": 2048, "num_experts_per_tok": 6,
                        "n_routed_experts": 256, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5,
                        "mlp_layer_types": None, "swiglu_limit": 10.0, "hidden_act": "silu",
                    },
                    renamed=LOCAL_IS_ROUTED | {"intermediate_size": "moe_intermediate_size"},
                    nullable=("mlp_layer_types",),
                    older=config_class.hash_or_moe_layer,
                ),
            ),
        ),
        router={
            "scoring": key("scoring_func", values=SCORINGS),
            "selection": key(*_V4_LAYER, values={True: "hash", False: "top_k", "hash_moe": "hash", "moe": "top_k"}),
            "correction_bias": key(
                *_V4_LAYER, values={True: "none", False: "scores", "hash_moe": "none", "moe": "scores"}
            ),
            "renormalize_epsilon": 1e-20,
            "routed_scaling_factor": SCALE,
            "gate_dtype": "input",
            "score_dtype": "input",
        },
        activation=CLAMPED,
        shared=Shared(width=WIDTH_OF_EXPERT),  # one expert: n_shared_experts is not read
    ),
    Family(
        models=(ModelType("phimoe", ("PhimoeSparseMoeBlock",), MIXTRAL, ConfigClass({
            "hidden_size": 4096, "intermediate_size": 6400, "hidden_act": "silu", "num_experts_per_tok": 2,
            "num_local_experts": 16, "router_jitter_noise": 0.01,
        })),),
        router={
            "selection": "sparsemixer",
            "renormalize": False,
            "sparsemixer_epsilon": key(".router_jitter_noise", "router_jitter_noise", kind="number"),
            "gate_dtype": "input",
        },
        live=ROUTER,
    ),
    Family(
        models=(
            ModelType(
                "switch_transformers", ("SwitchTransformersSparseMLP",),
                (TensorNames("switch", "mlp", ungated("wi", "wo", "experts.expert_{e}.") + _CLASSIFIER),),
                ConfigClass({
                    "d_model": 768, "d_ff": 2048, "expert_capacity": 64, "num_experts": 8, "dense_act_fn": "relu",
                }, renamed={"hidden_size": "d_model"}),
            ),
        ),
        router={"renormalize": False, "capacity": key(".expert_capacity", "expert_capacity", kind="int")},
        activation={
            "act": key(".act", "dense_act_fn", values={"relu": {"function": "relu"}, "gelu": {"function": "gelu"}}),
            "gated": False,
        },
        top_k=1,
        intermediate_size=key("d_ff"),
        live=LiveBlock(
            router="router",
            logits_at=2,
            tensors={
                "gate_up": made("stack", "experts.expert_{e}.wi.weight"),
                "down": made("stack", "experts.expert_{e}.wo.weight"),
                "router.bias": same("router.classifier.bias"),
            },
        ),
    ),
    Family(
        models=(
            ModelType("nllb-moe", ("NllbMoeSparseMLP",), _NLLB, UNREAD),
            ModelType("nllb_moe", (), _NLLB, UNREAD),
        ),
        refused=(
            "transformers applies one_hot to the 0/1 mask of first choices, so that every token goes to experts 0 and "
            "1: there is no correct output to match"
        ),
    ),
    Family(
        models=(ModelType("doge", ("DogeCDMoE",), (), UNREAD),),
        refused="product-key retrieval of rank-one experts (PEER), no router over feed-forward experts",
    ),
    Family(
        models=(ModelType("jetmoe_attention", ("JetMoeMoA",), (), UNREAD),),
        refused="a mixture of attention heads, not of feed-forward experts",
    ),
    Family(
        models=(ModelType("vitpose_backbone", ("VitPoseBackboneMoeMLP", "VitPoseNaiveMoe"), (), UNREAD),),
        refused="one head for each data set, without a router",
    ),
)  # fmt: skip
