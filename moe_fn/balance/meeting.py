"""Compares records of ranks through torch.distributed's store: each rank writes a text, one compares, all read the
result.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from moe_fn.torch_compat import default_store

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.2
_GRACE_S = 2.0  # for an answer that is being written, and for its slowest reader

Compare = Callable[[dict[int, str]], list[str]]
_NOT_THERE = object()


def format_ranks(ranks: Sequence[int]) -> str:
    """Ranks as text, with runs of three or more as ranges.

    >>> format_ranks([2]), format_ranks([0, 1, 4, 5, 6, 7])
    ('rank 2', 'ranks 0, 1, 4-7')
    """
    runs = [
        [r for _, r in run]
        for _, run in itertools.groupby(enumerate(sorted(ranks)), key=lambda pair: pair[1] - pair[0])
    ]
    parts = [part for run in runs for part in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run))]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(parts)}"


def differing_fields(fields_of_rank: dict[int, dict[str, Any]]) -> list[str]:
    """A message for each field that is not the same on all ranks.

    >>> differing_fields({0: {"top_k": 2, "bias": 1}, 1: {"top_k": 3, "bias": 1}})
    ['top_k is 2 on rank 0 and 3 on rank 1']
    """
    found = []
    for name in dict.fromkeys(name for fields in fields_of_rank.values() for name in fields):
        ranks_of_value: dict[str, list[int]] = {}
        for rank, fields in fields_of_rank.items():
            value = fields.get(name, _NOT_THERE)
            ranks_of_value.setdefault("not there" if value is _NOT_THERE else repr(value), []).append(rank)
        if len(ranks_of_value) > 1:
            parts = [f"{value} on {format_ranks(ranks)}" for value, ranks in ranks_of_value.items()]
            found.append(f"{name} is {', '.join(parts[:-1])} and {parts[-1]}")
    return found


def meet(ranks: Sequence[int], mine: int, text: str, timeout_s: float, compare: Compare) -> str:
    """Compares the texts of all ranks; returns the same message on every rank that called, "" if nothing differs.

    The first of `ranks` reads all texts, so the store transfers two texts per rank, not one per pair of ranks. A rank
    that has waited timeout_s without an answer decides instead. The first decision is final, also for ranks that call
    later.
    """
    base = (
        f"moe_fn/meeting/{'-'.join(map(str, ranks))}"
        if len(ranks) < 9
        else f"moe_fn/meeting/{ranks[0]}-{ranks[-1]}-{len(ranks)}"
    )
    try:
        number = default_store(base).add(f"calls/{mine}", 1)  # the count is in the store: this module has no state
        return _meet(default_store(f"{base}/{number}"), ranks, mine, text, timeout_s, compare)
    except RuntimeError as error:  # torch's DistError is one
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"the store of torch.distributed ended with its process (rank 0, or torchrun): {reason}"


def _meet(store: Any, ranks: Sequence[int], mine: int, text: str, timeout_s: float, compare: Compare) -> str:
    start = time.monotonic()
    store.set(f"text/{mine}", text)
    keys = {rank: f"text/{rank}" for rank in ranks}

    def absent() -> list[int]:
        return (
            [] if store.check(list(keys.values())) else [rank for rank, key in keys.items() if not store.check([key])]
        )

    leads = mine == ranks[0]
    patience = timeout_s if leads else timeout_s + _GRACE_S / 2
    decided = _wait(lambda: store.check(["answer"]) or (leads and store.check(list(keys.values()))), start + patience)
    if not store.check(["answer"]):
        missing = absent()
        came = [rank for rank in ranks if rank not in missing]
        found = compare({rank: store.get(keys[rank]).decode() for rank in came}) if leads else []
        if missing:
            found = [
                f"{format_ranks(missing)} did not call within {timeout_s:g} s, {format_ranks(came)} did",
                *found,
            ]
        elif not decided:
            found = [
                f"{format_ranks(ranks[:1])} called, but gave no answer within {timeout_s:g} s: it ended or hangs",
                *found,
            ]
        if store.add("decisions", 1) == 1:
            store.set("answer", "=" + "; ".join(found))  # a store may treat an empty value as missing
    if not _wait(lambda: store.check(["answer"]), time.monotonic() + _GRACE_S):
        return "the rank that compared ended before it gave its answer"
    answer: str = store.get("answer").decode()[1:]
    store.add("readers", 1)
    if answer:  # all ranks will raise; wait until the others have read why, since the store may end with this process
        _wait(lambda: store.add("readers", 0) >= len(ranks) - len(absent()), time.monotonic() + _GRACE_S)
    return answer


def _wait(ready: Callable[[], bool], until: float) -> bool:
    pause = _FIRST_PAUSE_S
    while not ready():
        if time.monotonic() >= until:
            return False
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE_S)
    return True
