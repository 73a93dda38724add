"""Collectives with gradients as ops; in a graph they are torch's functional collectives, which Inductor schedules.

Why ops: torch's own gradients always sum over ranks. Where ranks have the same tokens (tensor and sequence parallelism)
each of them has the same loss, which a sum would count once per rank. Obsolete when torch has collectives that know
whether their input is replicated. Each is linear, and the gradient of each is another of them ("replicated": the same
on every rank):

    sum_over_ranks   x -> sum over ranks, replicated                 gradient: identity
    copy_to_ranks    x, replicated -> x, used differently by ranks   gradient: sum_over_ranks
    gather_ranks     rows of all ranks, concatenated                 gradient: scatter_ranks
    scatter_ranks    sum over ranks, this rank's block of rows       gradient: gather_ranks
    own_rows         x, replicated -> this rank's block of rows      gradient: join_rows
    join_rows        blocks of rows -> all rows, replicated          gradient: own_rows
    exchange_ranks   block r of this rank goes to rank r             gradient: exchange_ranks
    exchange_splits  the same with blocks of given sizes             gradient: exchange_splits, sizes swapped

Each is two ops, one that starts the collective and one that waits for it (`wait`), so that other work can overlap with
it: start_gather(x, group), anything that does not read its result, wait(...). The functions without `start_` do both.
The result of a `start_` function must not be read before `wait`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives  # defines the ops
from torch import Tensor
from torch.nn.functional import pad

from moe_fn.config import RankGroup
from moe_fn.numerics import accumulation_dtype
from moe_fn.ops.define import Kernel, define_op


def _no_vmap(name: str) -> Kernel:
    def rule(*args: Any) -> Any:
        raise ValueError(
            f"moe_fn::{name} has no batching rule: vmap of a layer that is shared by ranks; expected parallel=None"
        )

    return rule


def _op(
    schema: str,
    kernel: Kernel,
    fake: Kernel,
    backward: Callable[[list[Any], Tensor], Tensor],
    again: Callable[..., Tensor],
) -> Any:
    """Defines an op that is linear in its first argument. again: the op itself, applied to tangents in forward mode."""
    name = schema[: schema.index("(")]
    return define_op(
        schema,
        kernel=kernel,
        fake=fake,
        vmap=_no_vmap(name),
        backward=lambda inputs, needed, gradient: (backward(inputs, gradient), *[None] * (len(inputs) - 1)),
        jvp=lambda inputs, tangent, *_: again(tangent, *inputs[1:]),
        visible=kernel,
    )


# Torch's functional collectives as ops: their Python wrappers differ between torch versions.
_functional: Any = torch.ops._c10d_functional


def _wait_tensor(x: Tensor) -> Tensor:
    y: Tensor = _functional.wait_tensor(x)
    return y


def _waited(x: Tensor) -> Tensor:
    """Waits and returns a new tensor object, since autograd saves the input."""
    y: Tensor = torch.ops.aten.alias(_wait_tensor(x))
    return y


def _all_reduce(x: Tensor, group: str, size: int, ordered: bool) -> Tensor:
    if not ordered:
        y: Tensor = _functional.all_reduce(x.contiguous(), "sum", group)
        return y
    count = x.numel()
    own = _reduce_scatter(pad(x.reshape(-1), (0, -count % size)), group, size, ordered)
    return _wait_tensor(_all_gather(own, group, size)).narrow(0, 0, count).view(x.shape).clone()


def _all_gather(x: Tensor, group: str, size: int, *_: Any) -> Tensor:
    y: Tensor = _functional.all_gather_into_tensor(x.contiguous(), size, group)
    return y


def _reduce_scatter(x: Tensor, group: str, size: int, ordered: bool) -> Tensor:
    if not ordered:
        y: Tensor = _functional.reduce_scatter_tensor(x.contiguous(), "sum", size, group)
        return y
    blocks: Tensor = _wait_tensor(_all_to_all(x, group, size)).unflatten(0, (size, x.shape[0] // size))
    total = blocks[0].to(accumulation_dtype(x.dtype))
    for block in blocks[1:]:
        total = total + block
    return total.to(x.dtype)


def _block(x: Tensor, group: str, size: int, rank: int) -> Tensor:
    rows = x.shape[0] // size
    return x.narrow(0, rank * rows, rows).clone()


def _blocks(x: Tensor, group: str, size: int, rank: int) -> Tensor:
    return _all_gather(x, group, size)


def _all_to_all(x: Tensor, group: str, size: int) -> Tensor:
    blocks = [x.shape[0] // size] * size
    y: Tensor = _functional.all_to_all_single(x.contiguous(), blocks, blocks, group)
    return y


def _all_to_all_splits(x: Tensor, sent: Sequence[int], received: Sequence[int], group: str) -> Tensor:
    y: Tensor = _functional.all_to_all_single(x.contiguous(), list(received), list(sent), group)
    return y


def _like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


_wait: Any = _op("wait(Tensor x) -> Tensor", _waited, _like, lambda i, g: g, lambda *a: _wait(*a))
_sum: Any = _op(
    "sum_over_ranks(Tensor x, str group, int size, bool ordered) -> Tensor",
    _all_reduce,
    _like,
    lambda i, g: g.clone(),
    lambda *a: _sum(*a),
)
_copy: Any = _op(
    "copy_to_ranks(Tensor x, str group, int size, bool ordered) -> Tensor",
    lambda x, *_: x.clone(),
    _like,
    lambda i, g: _wait(_sum(g, *i[1:])),
    lambda *a: _copy(*a),
)
_gather: Any = _op(
    "gather_ranks(Tensor x, str group, int size, bool ordered) -> Tensor",
    _all_gather,
    lambda x, group, size, ordered: x.new_empty(x.shape[0] * size, *x.shape[1:]),
    lambda i, g: _wait(_scatter(g, *i[1:])),
    lambda *a: _gather(*a),
)
_scatter: Any = _op(
    "scatter_ranks(Tensor x, str group, int size, bool ordered) -> Tensor",
    _reduce_scatter,
    lambda x, group, size, ordered: x.new_empty(x.shape[0] // size, *x.shape[1:]),
    lambda i, g: _wait(_gather(g, *i[1:])),
    lambda *a: _scatter(*a),
)
_own: Any = _op(
    "own_rows(Tensor x, str group, int size, int rank) -> Tensor",
    _block,
    lambda x, group, size, rank: x.new_empty(x.shape[0] // size, *x.shape[1:]),
    lambda i, g: _wait(_join(g, i[1], i[2], i[3])),
    lambda *a: _own(*a),
)
_join: Any = _op(
    "join_rows(Tensor x, str group, int size, int rank) -> Tensor",
    _blocks,
    lambda x, group, size, rank: x.new_empty(x.shape[0] * size, *x.shape[1:]),
    lambda i, g: _own(g, i[1], i[2], i[3]),
    lambda *a: _join(*a),
)
_exchange: Any = _op(
    "exchange_ranks(Tensor x, str group, int size) -> Tensor",
    _all_to_all,
    _like,
    lambda i, g: _wait(_exchange(g, i[1], i[2])),
    lambda *a: _exchange(*a),
)
_exchange_splits: Any = _op(
    "exchange_splits(Tensor x, SymInt[] sent, SymInt[] received, str group) -> Tensor",
    _all_to_all_splits,
    lambda x, sent, received, group: x.new_empty(sum(received), *x.shape[1:]),
    lambda i, g: _wait(_exchange_splits(g, i[2], i[1], i[3])),
    lambda *a: _exchange_splits(*a),
)


def _group_args(group: RankGroup) -> tuple[str, int, bool]:
    """Arguments of collectives with a sum in forward or backward: group name, size, ordered."""
    return group.name, group.size, group.ordered


def wait(x: Tensor) -> Tensor:
    """Waits for a started collective and returns its result."""
    y: Tensor = _wait(x)
    return y


def sum_over_ranks(x: Tensor, group: RankGroup | None) -> Tensor:
    """The sum over the group's ranks, or x if group is None; its gradient is already the same on each rank."""
    return x if group is None else wait(start_sum(x, group))


def start_sum(x: Tensor, group: RankGroup) -> Tensor:
    """Starts sum_over_ranks."""
    y: Tensor = _sum(x, *_group_args(group))
    return y


def copy_to_ranks(x: Tensor, group: RankGroup | None) -> Tensor:
    """x, of which each rank of the group uses its own part: gradients are summed over the ranks."""
    return x if group is None else _copy(x, *_group_args(group))  # type: ignore[no-any-return]


def start_gather(x: Tensor, group: RankGroup) -> Tensor:
    """Starts gather_ranks."""
    y: Tensor = _gather(x, *_group_args(group))
    return y


def gather_ranks(x: Tensor, group: RankGroup) -> Tensor:
    """Rows of all ranks, concatenated; equally many on each: [n, ...] -> [size * n, ...]."""
    return wait(start_gather(x, group))


def scatter_ranks(x: Tensor, group: RankGroup) -> Tensor:
    """This rank's block of rows of the sum over ranks: [size * n, ...] -> [n, ...]."""
    return wait(_scatter(x, *_group_args(group)))


def own_rows(x: Tensor, group: RankGroup) -> Tensor:
    """This rank's block of the rows of a replicated x: [size * n, ...] -> [n, ...]."""
    y: Tensor = _own(x, group.name, group.size, group.rank)
    return y


def join_rows(x: Tensor, group: RankGroup) -> Tensor:
    """Blocks of rows of all ranks, concatenated on each rank: [n, ...] -> [size * n, ...]."""
    return wait(_join(x, group.name, group.size, group.rank))


def start_exchange(x: Tensor, group: RankGroup) -> Tensor:
    """Starts exchange_ranks."""
    return _exchange(x, group.name, group.size)  # type: ignore[no-any-return]


def exchange_ranks(x: Tensor, group: RankGroup) -> Tensor:
    """All-to-all of equal blocks: block r of the rows goes to rank r: [size * n, ...] -> [size * n, ...]."""
    return wait(start_exchange(x, group))


def start_splits(x: Tensor, sent: Sequence[int], received: Sequence[int], group: RankGroup) -> Tensor:
    """Starts exchange_splits."""
    y: Tensor = _exchange_splits(x, sent, received, group.name)
    return y


def exchange_splits(x: Tensor, sent: Sequence[int], received: Sequence[int], group: RankGroup) -> Tensor:
    """All-to-all with sent[r] rows to rank r and received[r] rows from it."""
    return wait(start_splits(x, sent, received, group))


def reduced_over_ranks(x: Tensor, how: str, group_name: str) -> Tensor:
    """The elementwise "max" or "sum" over ranks, in the dtype of x, without gradient."""
    return _wait_tensor(_functional.all_reduce(x.contiguous(), how, group_name))
