"""Overrides for torchtitan's config that replace experts and token dispatcher; the only module that imports torchtitan.

    torchtitan_train ... --override.imports moe_fn.integrations.torchtitan.overrides.grouped_experts \\
                                            moe_fn.integrations.torchtitan.overrides.token_dispatcher
    ... --override.imports 'moe_fn.integrations.torchtitan.overrides.grouped_experts={"compute_dtype": "bfloat16"}'

Initialization, sharding and checkpoints remain torchtitan's.
"""

from typing import Any

import torch
from torchtitan.config import derive, override
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

from moe_fn.integrations.torchtitan.dispatcher import dispatcher_class
from moe_fn.integrations.torchtitan.experts import experts_class


@override(target=GroupedExperts.Config, description="Routed experts with moe_fn.")  # type: ignore[untyped-decorator]
def grouped_experts(config: Any, *, compute_dtype: str | None = None) -> Any:
    """The config of experts on moe_fn. Raises ValueError for unknown classes, such as quantized ones."""
    dtype = None if compute_dtype is None else getattr(torch, compute_dtype, None)
    if compute_dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"grouped_experts: compute_dtype is {compute_dtype!r}; expected a torch dtype such as 'bfloat16'"
        )
    return derive(config, experts_class(type(config)._owner, dtype).Config)


@override(target=LocalTokenDispatcher.Config, description="Local dispatch and combine with moe_fn.", exact=True)  # type: ignore[untyped-decorator]
def token_dispatcher(config: Any) -> Any:
    """The config of the dispatcher on moe_fn, without expert parallelism."""
    return derive(config, dispatcher_class(LocalTokenDispatcher).Config)
