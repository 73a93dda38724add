"""Scores of logits, and choosing among values."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# What a value that is not finite counts as in a choice: less than all others, but still something that can be chosen.
LOWEST = torch.finfo(torch.float32).min


def sqrt_softplus(z: Tensor) -> Tensor:
    """sqrt(log(1 + exp(z))), with derivative 0 where that underflows to 0."""
    p = functional.softplus(z)
    return torch.where(p == 0, 0.0, torch.where(p == 0, 1.0, p).sqrt())


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: torch.softmax(z, dim=0),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": sqrt_softplus,
    "identity": lambda z: z,
}


def score(name: str, z: Tensor) -> Tensor:
    """The score function of a vector z; a score that is not finite is 0, with gradient 0.

    softmax: exp(z) / sum(exp(z));  sigmoid: 1 / (1 + exp(-z)); sqrtsoftplus: sqrt(log(1 + exp(z))); identity: z.
                                    Source: semantics.md 1.

    >>> score("softmax", torch.tensor([0.0, 0.0])), score("softmax", torch.tensor([0.0, torch.nan]))
    (tensor([0.5000, 0.5000]), tensor([0., 0.]))
    """
    function = SCORES[name]
    finite = function(z.detach()).isfinite()
    # Such a z is replaced on the way in as well: autograd multiplies by its derivative, and 0 * NaN is NaN.
    return torch.where(finite, function(torch.where(finite, z, 0.0)), 0.0)


def comparable(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values as a choice sees them: rounded to dtype, finite, and without gradient."""
    rounded = values.detach().to(dtype)
    return torch.where(rounded.isfinite(), rounded, LOWEST)


def best(values: Tensor, count: int) -> list[int]:
    """The places of the largest values, largest first; of equals the first place wins.

    >>> best(torch.tensor([1.0, 3.0, 2.0, 3.0]), 3)
    [1, 3, 2]
    """
    numbers = values.tolist()
    return sorted(range(len(numbers)), key=lambda place: (-numbers[place], place))[:count]


def pick(values: Tensor, ids: list[int], *, missing: float) -> Tensor:
    """values[id] for every id, and `missing` for an id that is no place in values, such as -1."""
    return torch.stack([values[i] if 0 <= i < len(values) else values.new_full((), missing) for i in ids])
