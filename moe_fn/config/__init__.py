"""Configs of the MoE layer as frozen dataclasses: `MoEConfig` and the configs that it nests, one per concern.

They hold no tensors or callables and read no environment variables. A config is hashable, comparable and picklable, and
round-trips through JSON; `torch.compile` and `torch.export` treat it as a constant. Constructors check every value.
"""

from torch.utils._pytree import register_constant

from moe_fn.config.activation import ActivationConfig, ActivationName, as_activation
from moe_fn.config.lora import LoRAConfig
from moe_fn.config.moe import MoEConfig, config_of_json
from moe_fn.config.parallel import ParallelConfig, RankGroup
from moe_fn.config.parts import ExpertNormConfig, LatentConfig, NormsConfig, SharedExpertsConfig, ZeroExpertsConfig
from moe_fn.config.quant import ActivationQuantConfig, QuantConfig
from moe_fn.config.router import GroupConfig, RouterConfig

__all__ = [
    "ActivationConfig", "ActivationName", "ActivationQuantConfig", "ExpertNormConfig", "GroupConfig", "LatentConfig",
    "LoRAConfig",
    "MoEConfig", "NormsConfig", "ParallelConfig", "QuantConfig", "RankGroup", "RouterConfig", "SharedExpertsConfig",
    "ZeroExpertsConfig",
    "as_activation", "config_of_json",
]  # fmt: skip

for _cls in (
    MoEConfig,
    RouterConfig,
    GroupConfig,
    SharedExpertsConfig,
    ZeroExpertsConfig,
    LatentConfig,
    LoRAConfig,
    ExpertNormConfig,
    NormsConfig,
    ParallelConfig,
    QuantConfig,
    ActivationQuantConfig,
    RankGroup,
    ActivationConfig,
):
    register_constant(_cls)
