"""batch_invariant=True over ranks (gloo): a token's bits do not depend on the number of tokens of other ranks."""

import dataclasses
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks.cases import BASE
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import moe_fn
from moe_fn import MoEConfig, ParallelConfig, SharedExpertsConfig
from moe_fn.ops import collectives
from moe_fn.testing import weights_for
from shared_tests.ranks import ranks_context, started

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
LAYER = dataclasses.replace(
    BASE,
    top_k=4,
    hidden_size=72,
    intermediate_size=48,
    shared=SharedExpertsConfig(intermediate_size=24, gate="sigmoid"),
    batch_invariant=True,
)
FORMATS: dict[int, tuple[tuple[str, dict[str, Any]], ...]] = {
    2: (
        ("ep", {"dispatch": "all_gather"}),
        ("ep", {"dispatch": "all_gather", "gather": "logits", "max_tokens": 9}),
        ("ep", {"dispatch": "all_to_all"}),
        ("ep", {"dispatch": "all_to_all_static", "max_tokens": 9}),
        ("ep", {"dispatch": "replicated"}),
        ("tp", {}),
        ("tp", {"sequence_parallel": True, "dispatch": "all_to_all"}),
    ),
    4: (
        ("ep", {"dispatch": "all_gather", "ordered_sums": True}),
        ("ep", {"dispatch": "replicated", "ordered_sums": True}),
        ("tp", {"ordered_sums": True}),
    ),
}


def bits(config: MoEConfig, rank: int, same_everywhere: bool, others: int) -> tuple[Tensor, Tensor]:
    """Returns y and the gradient of x for the first token, which is followed by tokens of this rank, or of all
    ranks.
    """
    generator = torch.Generator().manual_seed(0)
    x, logits = (torch.randn(9, size, generator=generator) for size in (config.hidden_size, config.num_logits))
    count = 1 + others if same_everywhere or rank == 1 else 1
    mine = x[:count].clone().requires_grad_()
    weights = moe_fn.shard_weights(config, weights_for(LAYER, seed=3))
    y = moe_fn.moe_forward(config, weights, mine, logits[:count])
    (gradient,) = torch.autograd.grad(y.square().sum(), mine)
    return y[0].detach(), gradient[0]


def equal_bits(config: MoEConfig, rank: int, same_everywhere: bool) -> bool:
    alone, few, many = (bits(config, rank, same_everywhere, others) for others in (0, 3, 8))
    return all(torch.equal(a, b) for other in (few, many) for a, b in zip(alone, other, strict=True))


def worker(rank: int, world: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    meshes = {name: init_device_mesh("cpu", (world,), mesh_dim_names=(name,)) for name in ("ep", "tp")}
    found = []
    for name, options in FORMATS[world]:
        config = dataclasses.replace(LAYER, parallel=ParallelConfig.from_mesh(meshes[name], **{name: name}, **options))
        same_everywhere = name == "tp" or options["dispatch"] == "replicated"
        found.append((f"{name} {options}", equal_bits(config, rank, same_everywhere)))
        # gloo's all_reduce starts at a different rank for each part of a tensor
        if options.get("ordered_sums") and same_everywhere:
            with patch.object(collectives, "_group_args", lambda group: (group.name, group.size, False)):
                found.append(
                    (f"planted: not in order, {name} {options}", not equal_bits(config, rank, same_everywhere))
                )
    results.put((rank, found))
    dist.destroy_process_group()


@pytest.mark.parametrize("world", FORMATS)
def test_what_other_ranks_send_moves_no_bit(tmp_path: Path, world: int) -> None:
    context = ranks_context()
    results = context.Queue()
    arguments = [(rank, world, str(tmp_path / "store"), results) for rank in range(world)]
    with started(context, worker, arguments, tmp_path) as processes:
        found = dict(results.get(timeout=180) for _ in processes)
    assert [(rank, name) for rank, all_formats in found.items() for name, equal in all_formats if not equal] == []
    assert len(found) == world and all(len(all_formats) >= len(FORMATS[world]) for all_formats in found.values())
