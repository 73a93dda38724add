"""The Mixture-of-Experts layer as pure functions that compile to one graph."""

from moe_fn import balance, reference
from moe_fn.backends import BackendInfo, backends
from moe_fn.config import (
    ActivationConfig,
    ActivationQuantConfig,
    ExpertNormConfig,
    GroupConfig,
    LatentConfig,
    LoRAConfig,
    MoEConfig,
    NormsConfig,
    ParallelConfig,
    QuantConfig,
    RankGroup,
    RouterConfig,
    SharedExpertsConfig,
    ZeroExpertsConfig,
)
from moe_fn.forward import moe_forward, moe_forward_routed, moe_forward_shared, moe_forward_with_stats, moe_route
from moe_fn.fused.route import route
from moe_fn.layer.calibrate import calibrate
from moe_fn.layer.lora import add_lora, make_lora, merge_lora, unmerge_lora
from moe_fn.parallel import join_weights, shard_weights
from moe_fn.quant.calibration import Calibration
from moe_fn.records import (
    Dispatched,
    LatentWeights,
    LoRAWeights,
    MoEWeights,
    QuantWeights,
    RouterWeights,
    Routing,
    RoutingStats,
    SharedWeights,
)
from moe_fn.stages.combine import combine
from moe_fn.stages.dispatch import dispatch
from moe_fn.stages.experts import experts
from moe_fn.stages.reduce_and_trunc import reduce_and_trunc
from moe_fn.stages.replay import route_to
from moe_fn.torch_compat import mark_tokens
from moe_fn.weights.prepare import prepare_weights, restore_weights
from moe_fn.weights.quantize import dequantize_weights, quantize_weights

__version__ = "0.1.0"

__all__ = [
    "ActivationConfig", "ActivationQuantConfig", "BackendInfo", "Calibration", "Dispatched", "ExpertNormConfig",
    "GroupConfig",
    "LatentConfig", "LatentWeights", "LoRAConfig", "LoRAWeights", "MoEConfig", "MoEWeights", "NormsConfig",
    "ParallelConfig",
    "QuantConfig", "QuantWeights", "RankGroup", "RouterConfig", "RouterWeights", "Routing", "RoutingStats",
    "SharedExpertsConfig",
    "SharedWeights", "ZeroExpertsConfig", "add_lora", "backends", "balance", "calibrate", "combine",
    "dequantize_weights", "dispatch",
    "experts", "join_weights", "make_lora", "mark_tokens", "merge_lora", "moe_forward", "moe_forward_routed",
    "moe_forward_shared",
    "moe_forward_with_stats", "moe_route", "prepare_weights", "quantize_weights", "reduce_and_trunc", "reference",
    "restore_weights",
    "route", "route_to", "shard_weights", "unmerge_lora",
]  # fmt: skip
