"""Values of drawn problems, from a seed, for which the choice of experts is the same in every dtype.

If scores differ by less than their rounding error, float32 and float64 choose different experts, and outputs differ
although both are right. So the scores of two experts of a token must be exactly equal in every dtype, or far apart:

    logits  k/2 + 1/32 for integers k in -8 .. 8: exact in bfloat16, and only 17 values, so exact ties are common. The
            1/32 avoids near-ties: sigmoid(z) + sigmoid(-z) = 1 for all z, so on a grid with both z and -z, groups
            scored "top2_sum" would tie except for rounding; it also keeps the sum of "identity" scores away from 0.
            Over every scoring, multiplier and softcap that `configs()` draws, scores of one expert, sums of two, and
            both plus correction biases are equal or more than 3e-6 apart (relative for softmax)
    x       eighths between -4 and 4, and the gate inside the layer has quarters between -1/2 and 1/2: logits are exact
            multiples of 1/32 in every dtype and order of summation. Its bias, if any, has halves plus 1/128
"""

import torch
from torch import Tensor

from moe_fn.config import RouterConfig

GRID_STEP, GRID_OFFSET, GRID_HALF = 0.5, 1 / 32, 8
LogitsKind = str  # "spread", "two values", "one expert", "equal", "normal"
GRID_KINDS = ("spread", "two values", "one expert", "equal")


def logits_of_kind(kind: LogitsKind, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Logits [*leading, num_logits] in float32: on the grid, or normal with standard deviation 2."""
    if kind == "normal":
        return torch.randn(shape, generator=generator) * 2
    if kind == "spread":
        steps = torch.randint(-GRID_HALF, GRID_HALF + 1, shape, generator=generator)
    elif kind == "two values":
        steps = torch.randint(0, 2, shape, generator=generator) * 3
    elif kind == "one expert":  # every token chooses it, and the others differ
        steps = torch.randint(-GRID_HALF, 1, shape, generator=generator)
        steps[..., int(torch.randint(shape[-1], (), generator=generator))] = GRID_HALF
    else:
        steps = torch.zeros(shape)
    return steps * GRID_STEP + GRID_OFFSET


def x_of_shape(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal inputs, rounded to eighths."""
    return torch.randn(shape, generator=generator).mul_(8).round_().div_(8).clamp_(-4, 4)


def exact_gate(like: Tensor, generator: torch.Generator) -> Tensor:
    """A gate whose products with `x_of_shape` are exact."""
    return (torch.randint(-2, 3, like.shape, generator=generator) / 4).to(like)


def exact_gate_bias(like: Tensor, generator: torch.Generator) -> Tensor:
    """A bias of the gate with which no logit is zero and no two are opposite."""
    return (torch.randint(-2, 3, like.shape, generator=generator) / 2 + 1 / 128).to(like)


def needs_gate_bias(router: RouterConfig) -> bool:
    """Whether zero or opposite logits could make a sum of scores zero, or a tie except for rounding."""
    return router.scoring == "identity" or (router.groups is not None and router.groups.score == "top2_sum")


def poison(values: Tensor, token_mask: Tensor) -> Tensor:
    """NaN and infinities in the rows of padding."""
    garbage = torch.full_like(values, torch.nan)
    garbage[..., 1::3], garbage[..., 2::3] = torch.inf, -torch.inf
    return torch.where(token_mask.unsqueeze(-1), values, garbage)
