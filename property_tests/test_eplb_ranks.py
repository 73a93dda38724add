"""Moves of experts between processes, over gloo: bitwise equal, while the layer runs with the old weights."""

import time
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks.eplb import run

from shared_tests.ranks import ranks_context

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo here")
SECONDS = 120


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_experts_move_between_processes_bit_for_bit(ranks: int, tmp_path: Path) -> None:
    method = ranks_context().get_start_method()
    context = mp.start_processes(run, (ranks, str(tmp_path)), nprocs=ranks, join=False, start_method=method)
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):  # raises the error of a rank
            assert time.monotonic() < deadline, f"{ranks} ranks have not finished after {SECONDS} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
