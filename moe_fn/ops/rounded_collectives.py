"""What arrived in another form, codes and scales, with the gradient of the collective that took it there.

Why ops: codes are bytes, which have no gradient, so autograd cannot go back through the collective that carried them. What would remove
them: functional collectives in torch that take a dtype to travel in.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moe_fn.config import RankGroup
from moe_fn.ops import collectives

_as_gathered: Any = collectives._op(
    "as_gathered(Tensor x, Tensor received, str group, int size) -> Tensor",
    lambda x, received, group, size: received.clone(),
    lambda x, received, group, size: received.new_empty(received.shape),
    lambda i, g: collectives._arrived(collectives._scatter(g, i[2], i[3])),
    lambda t, received, group, size: collectives._arrived(collectives._gather(t, group, size)),
)
_as_exchanged: Any = collectives._op(
    "as_exchanged(Tensor x, Tensor received, str group, int size) -> Tensor",
    lambda x, received, group, size: received.clone(),
    lambda x, received, group, size: received.new_empty(received.shape),
    lambda i, g: collectives._arrived(collectives._exchange(g, i[2], i[3])),
    lambda t, received, group, size: collectives._arrived(collectives._exchange(t, group, size)),
)
_as_split: Any = collectives._op(
    "as_split(Tensor x, Tensor received, SymInt[] sent, SymInt[] received_sizes, str group) -> Tensor",
    lambda x, received, sent, received_sizes, group: received.clone(),
    lambda x, received, sent, received_sizes, group: received.new_empty(received.shape),
    lambda i, g: collectives._arrived(collectives._exchange_splits(g, i[3], i[2], i[4])),
    lambda t, received, sent, received_sizes, group: collectives._arrived(collectives._exchange_splits(t, sent, received_sizes, group)),
)


def as_gathered(x: Tensor, received: Tensor, group: RankGroup) -> Tensor:
    """`received`, which is gather_ranks(x) but for rounding: its gradient is that of gather_ranks."""
    y: Tensor = _as_gathered(x, received, group.name, group.size)
    return y


def as_exchanged(x: Tensor, received: Tensor, group: RankGroup) -> Tensor:
    """`received`, which is exchange_ranks(x) but for rounding: its gradient is that of exchange_ranks."""
    y: Tensor = _as_exchanged(x, received, group.name, group.size)
    return y


def as_split(x: Tensor, received: Tensor, sent: Sequence[int], received_sizes: Sequence[int], group: RankGroup) -> Tensor:
    """`received`, which is exchange_splits(x) but for rounding: its gradient is that of exchange_splits."""
    y: Tensor = _as_split(x, received, sent, received_sizes, group.name)
    return y
