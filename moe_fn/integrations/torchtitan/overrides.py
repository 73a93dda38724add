"""torchtitan's own way to swap a component, at its config: the only module here that imports torchtitan.

    torchtitan_train ... --override.imports moe_fn.integrations.torchtitan.overrides.grouped_experts \\
                                            moe_fn.integrations.torchtitan.overrides.token_dispatcher
    ... --override.imports 'moe_fn.integrations.torchtitan.overrides.grouped_experts={"compute_dtype": "bfloat16"}'

Everything after that is theirs: initialisation, sharding, checkpoints.
"""

from typing import Any

import torch
from torchtitan.config import derive, override
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

from moe_fn.integrations.torchtitan.dispatcher import dispatcher_class
from moe_fn.integrations.torchtitan.experts import experts_class


@override(target=GroupedExperts.Config, description="Routed experts by moe_fn.")  # type: ignore[untyped-decorator]
def grouped_experts(config: Any, *, compute_dtype: str | None = None) -> Any:
    """Experts by moe_fn; ValueError for a class that is none of theirs, such as a quantized one."""
    dtype = None if compute_dtype is None else getattr(torch, compute_dtype, None)
    if compute_dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"grouped_experts: compute_dtype is {compute_dtype!r}; expected a torch dtype such as 'bfloat16'"
        )
    return derive(config, experts_class(type(config)._owner, dtype).Config)


@override(target=LocalTokenDispatcher.Config, description="Local dispatch and combine by moe_fn.", exact=True)  # type: ignore[untyped-decorator]
def token_dispatcher(config: Any) -> Any:
    """Dispatch and combine by moe_fn, where there is no expert parallelism."""
    return derive(config, dispatcher_class(LocalTokenDispatcher).Config)
