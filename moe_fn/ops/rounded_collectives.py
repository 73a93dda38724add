"""Gradients of collectives that send rows as quantized codes and scales.

Why ops: codes are bytes, which have no gradient, so autograd cannot differentiate the collective that sent them.
Obsolete when torch's functional collectives take a dtype for transfer.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from moe_fn.config import RankGroup
from moe_fn.ops import collectives


def _as(schema: str, forward: Callable[..., Tensor], backward: Callable[..., Tensor]) -> Any:
    """An op (x, received, *args) -> received, differentiated like a collective.

    forward(t, *args) starts the collective, backward(t, *args) starts its gradient.
    """
    return collectives._op(
        schema,
        lambda x, received, *args: received.clone(),
        lambda x, received, *args: received.new_empty(received.shape),
        lambda inputs, gradient: collectives._wait(backward(gradient, *inputs[2:])),
        lambda tangent, received, *args: collectives._wait(forward(tangent, *args)),
    )


_as_gathered = _as(
    "as_gathered(Tensor x, Tensor received, str group, int size, bool ordered) -> Tensor",
    lambda t, *args: collectives._gather(t, *args),
    lambda t, *args: collectives._scatter(t, *args),
)
_as_exchanged = _as(
    "as_exchanged(Tensor x, Tensor received, str group, int size) -> Tensor",
    lambda t, *args: collectives._exchange(t, *args),
    lambda t, *args: collectives._exchange(t, *args),
)
_as_split = _as(
    "as_split(Tensor x, Tensor received, SymInt[] sent, SymInt[] received_sizes, str group) -> Tensor",
    lambda t, *args: collectives._exchange_splits(t, *args),
    lambda t, sent, received_sizes, group: collectives._exchange_splits(t, received_sizes, sent, group),
)


def as_gathered(x: Tensor, received: Tensor, group: RankGroup) -> Tensor:
    """`received`, a rounded gather_ranks(x), with the gradient of gather_ranks."""
    y: Tensor = _as_gathered(x, received, *collectives._group_args(group))
    return y


def as_exchanged(x: Tensor, received: Tensor, group: RankGroup) -> Tensor:
    """`received`, a rounded exchange_ranks(x), with the gradient of exchange_ranks."""
    y: Tensor = _as_exchanged(x, received, group.name, group.size)
    return y


def as_split(
    x: Tensor, received: Tensor, sent: Sequence[int], received_sizes: Sequence[int], group: RankGroup
) -> Tensor:
    """`received`, a rounded exchange_splits(x), with the gradient of exchange_splits."""
    y: Tensor = _as_split(x, received, sent, received_sizes, group.name)
    return y
