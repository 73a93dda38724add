"""Reference scores of logits, and top-k of values."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# Replaces non-finite values in a top-k: less than all other values, but can be chosen.
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

    softmax: exp(z) / sum(exp(z));  sigmoid: 1 / (1 + exp(-z));  sqrtsoftplus: sqrt(log(1 + exp(z))) (DeepSeek-V4);
    identity: z.

    >>> score("softmax", torch.tensor([0.0, 0.0])), score("softmax", torch.tensor([0.0, torch.nan]))
    (tensor([0.5000, 0.5000]), tensor([0., 0.]))
    """
    function = SCORES[name]
    finite = function(z.detach()).isfinite()
    # The input is replaced as well: autograd multiplies by the derivative at z, and 0 * NaN is NaN.
    return torch.where(finite, function(torch.where(finite, z, 0.0)), 0.0)


def comparable(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that a top-k compares: rounded to dtype, finite, without gradient."""
    rounded = values.detach().to(dtype)
    return torch.where(rounded.isfinite(), rounded, LOWEST)


def best(values: Tensor, count: int) -> list[int]:
    """Indices of the largest values, largest first; ties go to the lowest index.

    >>> best(torch.tensor([1.0, 3.0, 2.0, 3.0]), 3)
    [1, 3, 2]
    """
    numbers = values.tolist()
    return sorted(range(len(numbers)), key=lambda i: (-numbers[i], i))[:count]


def pick(values: Tensor, ids: list[int], *, missing: float) -> Tensor:
    """values[id] for every id, or `missing` for an id out of range, such as -1."""
    return torch.stack([values[i] if 0 <= i < len(values) else values.new_full((), missing) for i in ids])
