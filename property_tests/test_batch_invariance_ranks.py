"""batch_invariant=True over two ranks (gloo): a token's bits, however many tokens the other rank sends."""

import dataclasses
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_cases import BASE
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import moe_fn
from moe_fn import MoEConfig, ParallelConfig, SharedExpertsConfig
from moe_fn.testing import weights_for

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
LAYER = dataclasses.replace(
    BASE, hidden_size=72, intermediate_size=48, shared=SharedExpertsConfig(intermediate_size=24, gate="sigmoid"), batch_invariant=True
)
FORMATS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ep", {"dispatch": "all_gather"}),
    ("ep", {"dispatch": "all_gather", "gather": "logits", "max_tokens": 9}),
    ("ep", {"dispatch": "all_to_all"}),
    ("ep", {"dispatch": "all_to_all_static", "max_tokens": 9}),
    ("ep", {"dispatch": "replicated"}),
    ("tp", {}),
    ("tp", {"sequence_parallel": True, "dispatch": "all_to_all"}),
)


def bits(config: MoEConfig, rank: int, same_everywhere: bool, others: int) -> tuple[Tensor, Tensor]:
    """y and the gradient of x of the first token, which stands in front of others: of this rank's, or of everybody's."""
    generator = torch.Generator().manual_seed(0)
    x, logits = (torch.randn(9, size, generator=generator) for size in (config.hidden_size, config.num_logits))
    count = 1 + others if same_everywhere or rank == 1 else 1
    mine = x[:count].clone().requires_grad_()
    weights = moe_fn.shard_weights(config, weights_for(LAYER, seed=3))
    y = moe_fn.moe_forward(config, weights, mine, logits[:count])
    (gradient,) = torch.autograd.grad(y.square().sum(), mine)
    return y[0].detach(), gradient[0]


def worker(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    meshes = {name: init_device_mesh("cpu", (2,), mesh_dim_names=(name,)) for name in ("ep", "tp")}
    found = []
    for name, options in FORMATS:
        config = dataclasses.replace(LAYER, parallel=ParallelConfig.from_mesh(meshes[name], **{name: name}, **options))
        same_everywhere = name == "tp" or options["dispatch"] == "replicated"
        alone, few, many = (bits(config, rank, same_everywhere, others) for others in (0, 3, 8))
        equal = all(torch.equal(a, b) for other in (few, many) for a, b in zip(alone, other, strict=True))
        found.append((f"{name} {options}", equal))
    results.put((rank, found))
    dist.destroy_process_group()


def test_what_other_ranks_send_moves_no_bit(tmp_path: Path) -> None:
    context: Any = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=worker, args=(rank, str(tmp_path / "store"), results), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=180) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=20)
            process.kill()
    assert [(rank, name) for rank, all_formats in found.items() for name, equal in all_formats if not equal] == []
    assert len(found) == 2 and all(len(all_formats) == len(FORMATS) for all_formats in found.values())
