"""Errors over ranks: every format of `moe_fn.ParallelConfig` in processes of one machine (gloo), against the bound."""

import dataclasses
import itertools
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import moe_fn
from campaign.drawing import DTYPES
from campaign.measuring import Measured, compare, measured, problem_for
from moe_fn.config import ActivationQuantConfig, MoEConfig, ParallelConfig, QuantConfig, SharedExpertsConfig
from shared_tests.ranks import started

_INT8 = QuantConfig(
    scheme="int8",
    granularity="channel",
    activations=ActivationQuantConfig(scheme="int8", granularity="group", group_size=16),
)
_BASE = MoEConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=64)
LAYERS = {
    "experts": _BASE,
    "with shared experts": dataclasses.replace(_BASE, shared=SharedExpertsConfig(intermediate_size=32)),
    "int8, rows travel as codes": dataclasses.replace(_BASE, quant=_INT8),
}
# Mesh (names and sizes of dims, 2 or 4 ranks), and how the layer is distributed over it.
FORMATS: tuple[tuple[dict[str, int], dict[str, Any]], ...] = (
    ({"tp": 2}, {"dispatch": "replicated"}),
    ({"ep": 2}, {"dispatch": "replicated"}),
    ({"ep": 2}, {"dispatch": "all_gather"}),
    ({"ep": 2}, {"dispatch": "all_to_all"}),
    ({"ep": 2}, {"dispatch": "all_to_all_static", "max_tokens": 8}),
    ({"dp": 2}, {"dispatch": "all_gather"}),
    ({"tp": 2}, {"dispatch": "all_to_all", "sequence_parallel": True}),
    ({"tp": 2}, {"dispatch": "all_gather", "sequence_parallel": True}),
    ({"tp": 4}, {"dispatch": "replicated"}),
    ({"ep": 4}, {"dispatch": "all_to_all"}),
    ({"ep": 2, "tp": 2}, {"dispatch": "replicated"}),
    ({"ep": 2, "tp": 2}, {"dispatch": "all_gather"}),
    ({"ep": 2, "tp": 2}, {"dispatch": "all_to_all"}),
)
_TOKENS, _SEEDS, _PATIENCE_S = 8, 3, 300


def measure_ranks(worlds: tuple[int, ...] = (2, 4)) -> list[Measured]:
    """Measures every format, layer and dtype."""
    return [row for world in worlds for row in _of_world(world)]


def _of_world(world: int) -> list[Measured]:
    context: Any = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(rank, world, f"{folder}/store", results) for rank in range(world)]
        with started(context, _rank, arguments, Path(folder)) as ranks:
            found = [results.get(timeout=_PATIENCE_S) for _ in ranks]
    keys = list(found[0])
    return [measured(what, dtype, [one for rank in found for one in rank[what, dtype]]) for what, dtype in keys]


def _rank(rank: int, world: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    method = f"file://{Path(store)}"
    dist.init_process_group(
        "gloo", init_method=method, rank=rank, world_size=world, timeout=timedelta(seconds=_PATIENCE_S)
    )
    found = {}
    for (mesh_of, options), (layer, config) in itertools.product(FORMATS, LAYERS.items()):
        sizes = tuple(mesh_of.values())
        if torch.tensor(sizes).prod() != world:
            continue
        mesh = dist.device_mesh.init_device_mesh("cpu", sizes, mesh_dim_names=tuple(mesh_of))
        parallel = ParallelConfig.from_mesh(mesh, **{name: name for name in mesh_of}, **options)
        same = {"tp"} | ({"ep"} if options["dispatch"] == "replicated" else set())
        number = sum(mesh.get_local_rank(name) * 10 for name in mesh_of if name not in same)
        words = " ".join(["x".join(f"{name}{size}" for name, size in mesh_of.items()), *map(str, options.values())])
        for name, dtype in DTYPES.items():
            found[f"ranks {words.replace(' True', ' sequence parallel')}: {layer}", name] = _errors(
                config, parallel, dtype, number, world
            )
    results.put(found)
    dist.destroy_process_group()


def _errors(
    config: MoEConfig, parallel: ParallelConfig, dtype: torch.dtype, number: int, world: int
) -> list[tuple[float, float, float]]:
    """Returns (error, bound, share) of this rank's tokens for some seeds.

    All ranks have the same full weights; the tokens are those of `number`.
    """
    own, found = dataclasses.replace(config, parallel=parallel), []
    for seed in range(_SEEDS):
        whole = problem_for(config, dtype, seed, _TOKENS)
        tokens = problem_for(config, dtype, 100 + 10 * number + seed, _TOKENS)
        local = moe_fn.shard_weights(own, whole.weights)
        y = moe_fn.moe_forward(own, local, tokens.x, tokens.logits)
        found.append(compare(y, whole.replace(x=tokens.x, logits=tokens.logits), world))
    return found
