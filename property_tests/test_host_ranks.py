"""DDP and FSDP2 around modules that call the layer, in two processes: values and gradients are those of the module."""

from pathlib import Path

import pytest
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)
from ranks.hosts import WORLD, rank_of_hosts

from shared_tests.ranks import ranks_context, started

HARD_S = 120


def test_wrapped_modules_compute_what_the_module_does(tmp_path: Path) -> None:
    context = ranks_context()
    pipes = [context.Pipe(duplex=False) for _ in range(WORLD)]
    arguments = [(rank, str(tmp_path / "store"), pipes[rank][1]) for rank in range(WORLD)]
    with started(context, rank_of_hosts, arguments, tmp_path, wait_s=5):
        found = [pipe.recv() if pipe.poll(HARD_S) else {"all": f"no word for {HARD_S} s"} for pipe, _ in pipes]
    assert found == [{}] * WORLD, "\n".join(
        f"rank {rank}, {name}: {words}" for rank, of in enumerate(found) for name, words in of.items()
    )
