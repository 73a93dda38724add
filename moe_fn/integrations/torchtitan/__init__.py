"""torchtitan's Mixture-of-Experts on moe_fn: experts, local token dispatcher, router config, whole layer.

Their split is ours: RoutedExperts is `token_dispatcher.dispatch`, `inner_experts`, `token_dispatcher.combine`. Three
ways in:

    replace_grouped_experts(model)          in place, on a built model that is not parallelized yet; names and tensors
                                            stay
    --override.imports moe_fn.integrations.torchtitan.overrides.grouped_experts    at their config, before anything is
                                                                                   built
    moe_forward(config_of_moe(moe), weights_of_state(moe.state_dict()), x)         their layer as our pure function

Written against torchtitan 0.3.0 (wheel of 2026-09-03). Nothing here imports torchtitan, but for `overrides`: classes
are made of the base class that is there. Run on one CPU process, with torchtitan's own classes, with fully_shard, and
with DTensor parameters of a group of one. Never run: several ranks (expert parallelism keeps torchtitan's dispatchers),
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
