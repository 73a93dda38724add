"""Ranks meet in torch.distributed's store: each leaves a text, one compares them, all read one answer."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from moe_fn.torch_compat import default_store

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.2
_GRACE_S = 2.0  # for an answer that is on its way, and for the slowest reader of it

Compare = Callable[[dict[int, str]], list[str]]
_NOT_THERE = object()


def words_of_ranks(ranks: Sequence[int]) -> str:
    """Ranks for people.

    >>> words_of_ranks([2]), words_of_ranks([0, 1, 4, 5, 6, 7])
    ('rank 2', 'ranks 0, 1, 4-7')
    """
    runs = [
        [r for _, r in run]
        for _, run in itertools.groupby(enumerate(sorted(ranks)), key=lambda pair: pair[1] - pair[0])
    ]
    parts = [part for run in runs for part in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run))]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(parts)}"


def differing_fields(fields_of_rank: dict[int, dict[str, Any]]) -> list[str]:
    """Every field that is not the same on all ranks, in words.

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
            words = [f"{value} on {words_of_ranks(ranks)}" for value, ranks in ranks_of_value.items()]
            found.append(f"{name} is {', '.join(words[:-1])} and {words[-1]}")
    return found


def meet(ranks: Sequence[int], mine: int, text: str, timeout_s: float, compare: Compare) -> str:
    """The answer to all ranks' texts: the same words on every rank that came, "" where there is nothing to say.

    The first of `ranks` reads all texts, so the store moves two texts a rank, not a square of them. Who has waited in
    vain for timeout_s decides instead; the first decision is everybody's, also of ranks that come too late.
    """
    base = (
        f"moe_fn/meeting/{'-'.join(map(str, ranks))}"
        if len(ranks) < 9
        else f"moe_fn/meeting/{ranks[0]}-{ranks[-1]}-{len(ranks)}"
    )
    try:
        number = default_store(base).add(f"calls/{mine}", 1)  # the count lives in the store: this module has no state
        return _meet(default_store(f"{base}/{number}"), ranks, mine, text, timeout_s, compare)
    except RuntimeError as error:  # torch's DistError is one
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"the store of torch.distributed is gone, with the process that kept it (rank 0, or torchrun): {words}"


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
                f"{words_of_ranks(missing)} did not come within {timeout_s:g} s, {words_of_ranks(came)} did",
                *found,
            ]
        elif not decided:
            found = [
                f"{words_of_ranks(ranks[:1])} came, and gave no answer within {timeout_s:g} s: it is dead or hangs",
                *found,
            ]
        if store.add("decisions", 1) == 1:
            store.set("answer", "=" + "; ".join(found))  # a store may take an empty value for none
    if not _wait(lambda: store.check(["answer"]), time.monotonic() + _GRACE_S):
        return "the rank that compared is dead: it announced an answer and gave none"
    answer: str = store.get("answer").decode()[1:]
    store.add("readers", 1)
    if answer:  # all will end: not before the others have read why, for a store may end with its keeper
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
