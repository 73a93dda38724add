"""torchtitan's Mixture-of-Experts layer on moe_fn: experts, local token dispatcher, router config, whole layer.

torchtitan has the same stages: RoutedExperts is `token_dispatcher.dispatch`, `inner_experts`,
`token_dispatcher.combine`. There are three ways to use moe_fn:

    replace_grouped_experts(model)          in place, on a built model before parallelization; names and tensors are
                                            unchanged
    --override.imports moe_fn.integrations.torchtitan.overrides.grouped_experts    in torchtitan's config, before the
                                                                                   model is built
    moe_forward(config_of_moe(moe), weights_of_state(moe.state_dict()), x)         the layer as a pure function

Written against torchtitan 0.3.0 (wheel of 2026-09-03). Only `overrides` imports torchtitan; classes are derived from
the base class that is passed in. Tested in one CPU process with torchtitan's classes, with fully_shard, and with
DTensor parameters on a mesh of size 1. Not tested: several ranks (expert parallelism keeps torchtitan's dispatchers),
its trainer, its `parallelize`, GPUs.
"""

from moe_fn.integrations.torchtitan.dispatcher import DispatchMetadata, combine_rows, dispatch_tokens, dispatcher_class
from moe_fn.integrations.torchtitan.experts import experts_class, experts_of_rows
from moe_fn.integrations.torchtitan.layouts import LAYOUTS, ExpertsLayout, config_of_experts
from moe_fn.integrations.torchtitan.moe import config_of_moe, router_config, state_of_weights, weights_of_state
from moe_fn.integrations.torchtitan.replace import Replaced, replace_grouped_experts

__all__ = [
    "LAYOUTS", "DispatchMetadata", "ExpertsLayout", "Replaced", "combine_rows", "config_of_experts", "config_of_moe",
    "dispatch_tokens",
    "dispatcher_class", "experts_class", "experts_of_rows", "replace_grouped_experts", "router_config",
    "state_of_weights",
    "weights_of_state",
]  # fmt: skip
