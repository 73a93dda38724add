"""Which routers the kernel knows.

Apart from the kernel, for it is asked while tracing, where Triton may not be imported.
"""

import math

import torch

from moe_fn.config import MoEConfig

LANES = 1024  # of one program, in 4 warps: 8 keys of 8 bytes a thread. A row of 2048 spills on gfx942 (4 KB a thread)
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus", "identity")  # those of top_k._score
MOST_GROUPS = 32  # groups are ranked by comparing each with each


def covers(config: MoEConfig, dtype: torch.dtype) -> bool:
    """Whether route_top_k computes this config's ids and weights for logits of dtype.

    Not: a scoring that is not in SCORINGS, hash and sparsemixer, a choice in each group, weights for shared experts,
    scores in 16 bits, and logits of float64. What `weights.router.expert_scale` does comes between the norm and the
    scale, so it is not covered either: ask for it before.
    """
    router, groups = config.router, config.router.groups
    return (
        dtype in (torch.float16, torch.bfloat16, torch.float32)
        and (router.score_dtype == "float32" or dtype == torch.float32)
        and router.selection == "top_k"
        and router.scoring in SCORINGS
        and (groups is None or (groups.limit == "groups" and groups.count <= MOST_GROUPS))
        and (not router.renormalize or router.renormalize_order in (1.0, 2.0))
        and config.num_logits == config.num_choices
        and math.prod(lanes_of(config)) <= LANES
    )


def lanes_of(config: MoEConfig) -> tuple[int, int]:
    """Lanes of a row: for how many groups, and how many for each."""
    count = 1 if config.router.groups is None else config.router.groups.count
    return _power_of_two(count), max(2, _power_of_two(config.num_choices // count))


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
