"""A rank that dies, hangs or has another config: every other rank gets a clear error in time, never a hang or a wrong
result.
"""

import re
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks.faults import BAD, FAULTS, WORLD, rank_of_fault

from shared_tests.ranks import ranks_context, started

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
HARD_S = 30  # after which the test kills every rank, and fails
SLACK_S = 3.0  # for three processes on two busy cores
Answer = tuple[str, str, float]


def answers(name: str, folder: Path) -> dict[int, Answer]:
    """Returns the answer of each rank that is alive, within the hard timeout."""
    context = ranks_context()
    pipes = [context.Pipe(duplex=False) for _ in range(WORLD)]
    arguments = [(rank, name, str(folder / "store"), pipes[rank][1]) for rank in range(WORLD)]
    found: dict[int, Answer] = {}
    with started(context, rank_of_fault, arguments, folder, wait_s=0):
        for rank in range(WORLD):
            if rank != BAD and pipes[rank][0].poll(HARD_S):
                found[rank] = pipes[rank][0].recv()
        if pipes[BAD][0].poll(0.5 if found else 0):
            found[BAD] = pipes[BAD][0].recv()
    return found


@pytest.mark.parametrize("name", FAULTS)
def test_every_other_rank_gets_a_clear_error_in_time(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    found = answers(name, tmp_path)
    for rank in set(range(WORLD)) - {BAD}:
        assert rank in found, f"rank {rank} gave no answer for {HARD_S} s"
        kind, words, seconds = found[rank]
        print(f"{name}: rank {rank}: {seconds:.2f} s: {kind}: {words[:300]}")
        assert re.search(fault.words, words), (kind, words)
        assert kind == fault.kind or (fault.kind == "RuntimeError" and kind.startswith("Dist")), (kind, words)
        assert seconds <= fault.seconds + SLACK_S
    print(f"{name}: rank {BAD}: {found.get(BAD)}")
