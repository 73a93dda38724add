"""What arrived in another form, codes and scales, with the gradient of the collective that took it there.

Why ops: codes are bytes, which have no gradient, so autograd cannot go back through the collective that carried them.
What would remove them: functional collectives in torch that take a dtype to travel in.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from moe_fn.config import RankGroup
from moe_fn.ops import collectives


def _as(schema: str, forward: Callable[..., Tensor], backward: Callable[..., Tensor]) -> Any:
    """An op (x, received, *places) -> received; forward and backward are the collective and its gradient, begun, of (t,
    *places).
    """
    return collectives._op(
        schema,
        lambda x, received, *places: received.clone(),
        lambda x, received, *places: received.new_empty(received.shape),
        lambda inputs, gradient: collectives._wait(backward(gradient, *inputs[2:])),
        lambda tangent, received, *places: collectives._wait(forward(tangent, *places)),
    )


_as_gathered = _as(
    "as_gathered(Tensor x, Tensor received, str group, int size, bool ordered) -> Tensor",
    lambda t, *places: collectives._gather(t, *places),
    lambda t, *places: collectives._scatter(t, *places),
)
_as_exchanged = _as(
    "as_exchanged(Tensor x, Tensor received, str group, int size) -> Tensor",
    lambda t, *places: collectives._exchange(t, *places),
    lambda t, *places: collectives._exchange(t, *places),
)
_as_split = _as(
    "as_split(Tensor x, Tensor received, SymInt[] sent, SymInt[] received_sizes, str group) -> Tensor",
    lambda t, *places: collectives._exchange_splits(t, *places),
    lambda t, sent, received_sizes, group: collectives._exchange_splits(t, received_sizes, sent, group),
)


def as_gathered(x: Tensor, received: Tensor, group: RankGroup) -> Tensor:
    """`received`, which is gather_ranks(x) but for rounding: its gradient is that of gather_ranks."""
    y: Tensor = _as_gathered(x, received, *collectives._places(group))
    return y


def as_exchanged(x: Tensor, received: Tensor, group: RankGroup) -> Tensor:
    """`received`, which is exchange_ranks(x) but for rounding: its gradient is that of exchange_ranks."""
    y: Tensor = _as_exchanged(x, received, group.name, group.size)
    return y


def as_split(
    x: Tensor, received: Tensor, sent: Sequence[int], received_sizes: Sequence[int], group: RankGroup
) -> Tensor:
    """`received`, which is exchange_splits(x) but for rounding: its gradient is that of exchange_splits."""
    y: Tensor = _as_split(x, received, sent, received_sizes, group.name)
    return y
