"""What a layer computes, as frozen values: `MoEConfig` and the small configs that it nests, one per concern.

No tensors, callables or environment: a config hashes, compares, prints, pickles and round-trips through JSON, and
`torch.compile` and `torch.export` take it for a constant. Every value is checked when the config is made.
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
