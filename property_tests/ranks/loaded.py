"""Layers whose parts each rank has loaded from a checkpoint by its config: run by `test_parallel` in its processes."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import SAVED, adapter_of, config_of, holds, is_stacked, same_bits, weights_of
from quantized_files import FORMATS, E, X, mx, save, write
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import moe_fn
from moe_fn import MoEConfig, MoEWeights, ParallelConfig
from moe_fn.checkpoint import load_moe_layer, load_moe_weights, save_moe_weights
from moe_fn.testing import assert_matches

BIASES = (("down_bias",), ("shared", "down_bias"))
WITH_BIAS = tuple(layout for layout in SAVED if any(holds(layout, *path) for path in BIASES))
Part = tuple[MoEConfig, MoEWeights]  # of one rank
Load = Callable[[ParallelConfig | None], Part]


@dataclass(frozen=True)
class Loaded:
    """A mesh, how the layers are distributed over it, and the files that they are loaded from: a row of LOADS."""

    mesh: tuple[tuple[str, int], ...]
    files: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        mesh = "x".join(f"{name}{n}" for name, n in self.mesh)
        return f"{mesh} {' '.join(f'{k}={v}' for k, v in self.options.items())} loaded, {self.files}"


def plain_files(folder: Path) -> Iterator[tuple[str, Load]]:
    """Yields every layout that has a bias of down, with that bias."""
    for layout in WITH_BIAS:
        shared = (8, 2) if is_stacked(layout) else (8, 1) if holds(layout, "shared", "down") else None
        whole = config_of(layout, shared, num_experts=4, top_k=2, hidden_size=6, intermediate_size=8)
        weights = weights_of(layout, whole, bias=True, seed=1, dtype=torch.float32)
        path, prefix = folder / layout.name, ".".join(filter(None, ["layers.3", layout.block]))
        save_moe_weights(path, prefix, whole, weights, layout=layout)

        def load(
            parallel: ParallelConfig | None,
            layout: Any = layout,
            whole: Any = whole,
            path: Any = path,
            prefix: Any = prefix,
        ) -> Part:
            config = dataclasses.replace(whole, parallel=parallel)
            return config, load_moe_weights(path, prefix, config, layout=layout)

        yield layout.name, load


def quantized_files(folder: Path) -> Iterator[tuple[str, Load]]:
    """Yields quantized weights of two formats, and those of gpt-oss with its biases."""
    for name in ("ct w4a16 channel", "ct fp8 weight-only"):  # with rounded inputs scales would differ by slice
        (folder / name).mkdir()
        write(folder / name, FORMATS[name])
        yield name, lambda parallel, name=name: load_moe_layer(folder / name, 1, parallel=parallel)  # type: ignore[misc]
    random, mxfp4, prefix = np.random.default_rng(0), mx(("_blocks", "_scales"), 4, blocks=True), "model.layers.1.mlp"
    tensors: dict[str, Tensor] = {}
    for name, size in (("gate_up_proj", (256, X)), ("down_proj", (X, 128))):
        found = [mxfp4(random, *size).tensors for _ in range(E)]
        tensors |= {
            f"{prefix}.experts.{name}{suffix}": torch.stack([of_one[suffix] for of_one in found]) for suffix in found[0]
        }
        tensors |= {
            f"{prefix}.experts.{name}_bias": torch.randn(E, size[0], generator=torch.Generator().manual_seed(2))
        }
    tensors |= {f"{prefix}.router.weight": torch.ones(E, X), f"{prefix}.router.bias": torch.arange(float(E))}
    keys = {
        "num_local_experts": E,
        "num_experts_per_tok": 2,
        "hidden_size": X,
        "intermediate_size": 128,
        "swiglu_limit": 7.0,
    }
    (folder / "gpt-oss").mkdir()
    save(folder / "gpt-oss", tensors)
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}, **keys}
    (folder / "gpt-oss" / "config.json").write_text(json.dumps(config))
    yield "gpt-oss", lambda parallel: load_moe_layer(folder / "gpt-oss", 1, parallel=parallel)


FILES = {"plain": plain_files, "quantized": quantized_files}
MESHES: tuple[tuple[tuple[tuple[str, int], ...], dict[str, Any]], ...] = (
    ((("tp", 2),), {"dispatch": "replicated"}),
    ((("dp", 2),), {"dispatch": "all_gather"}),
    ((("tp", 4),), {"dispatch": "replicated", "shared": "replicated"}),
    ((("ep", 2), ("tp", 2)), {"dispatch": "all_to_all"}),
)


def loaded(world: int) -> list[Loaded]:
    """Returns every mesh of `world` ranks with every kind of file."""
    return [
        Loaded(mesh, files, options)
        for mesh, options in MESHES
        for files in FILES
        if np.prod([n for _, n in mesh]) == world
    ]


def run_loaded(case: Loaded, mesh: DeviceMesh, rank: int) -> None:
    """Asserts that ranks with loaded parts compute the output of one rank that loaded everything, and that each part is
    the one that shard_weights returns.
    """
    parallel = ParallelConfig.from_mesh(mesh, **{name: name for name, _ in case.mesh}, **case.options)
    differ = []
    with tempfile.TemporaryDirectory() as folder:
        for name, load in FILES[case.files](Path(folder)):
            (config, weights), (whole, all_weights) = load(parallel), load(None)
            generator = torch.Generator().manual_seed(7)
            x = torch.randn(5, whole.hidden_size, generator=generator)
            logits = torch.randn(5, whole.num_logits, generator=generator)
            parts = [moe_fn.moe_forward(config, weights, x, logits), moe_fn.moe_forward(whole, all_weights, x, logits)]
            differ += (
                [f"{name}: not the part of the whole"]
                if not same_bits(weights, moe_fn.shard_weights(config, all_weights))
                else []
            )
            biases = {all_weights.down_bias is not None, getattr(all_weights.shared, "down_bias", None) is not None}
            differ += [f"{name}: without a bias"] if case.files == "plain" and True not in biases else []
            adapters = [adapter_of(whole, shared=False, dtype=torch.float32)]
            part, layer = moe_fn.add_lora(config, weights, adapters), moe_fn.add_lora(whole, all_weights, adapters)
            adapted = [moe_fn.moe_forward(*part, x, logits), moe_fn.moe_forward(*layer, x, logits)]
            for of_ranks, of_one in (parts, adapted):
                try:
                    assert_matches(of_ranks, of_one, tolerance=1e-5, scale=0.1, name=name)
                except AssertionError as error:
                    differ.append(str(error))
    assert not differ, differ  # after the last collective: a rank that fails before would make the others wait
