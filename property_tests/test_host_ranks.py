"""DDP and FSDP2 around modules that call the layer, in two processes: values and gradients are those of the module."""

from pathlib import Path

import pytest
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)
from ranks.hosts import WORLD, rank_of_hosts
from ranks.start import ranks_context

HARD_S = 120


def test_wrapped_modules_compute_what_the_module_does(tmp_path: Path) -> None:
    context = ranks_context()
    pipes = [context.Pipe(duplex=False) for _ in range(WORLD)]
    processes = [
        context.Process(target=rank_of_hosts, args=(rank, str(tmp_path / "store"), pipes[rank][1]), daemon=True)
        for rank in range(WORLD)
    ]
    try:
        for process in processes:
            process.start()
        found = [pipe.recv() if pipe.poll(HARD_S) else {"all": f"no word for {HARD_S} s"} for pipe, _ in pipes]
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    assert found == [{}] * WORLD, "\n".join(
        f"rank {rank}, {name}: {words}" for rank, of in enumerate(found) for name, words in of.items()
    )
