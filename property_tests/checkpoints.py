"""Checkpoints for tests: a config and weights for every row of the layout table, and raw safetensors files."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

from moe_fn import (
    ExpertNormConfig,
    LatentConfig,
    LoRAWeights,
    MoEConfig,
    MoEWeights,
    NormsConfig,
    RouterConfig,
    SharedExpertsConfig,
    ZeroExpertsConfig,
    make_lora,
)
from moe_fn.checkpoint import LAYOUTS, Layout
from moe_fn.checkpoint.axes import sizes_of
from moe_fn.records import WEIGHT_PATHS, leaves_of_weights, weights_of_leaves
from moe_fn.testing import weights_for

SAVED = tuple(layout for layout in LAYOUTS if layout.savable)
_ZERO = {"longcat": ZeroExpertsConfig(count=2), "zaya": ZeroExpertsConfig(count=1, kind="zero")}


@dataclass(frozen=True)
class Block:
    """A block to save: layout, config, weights and prefix."""

    layout: Layout
    config: MoEConfig
    weights: MoEWeights
    prefix: str


def holds(layout: Layout, *path: str) -> bool:
    return any(entry.weight == path for entry in layout.entries)


def is_gated(layout: Layout) -> bool:
    return any(pins == ("G", 1) for entry in layout.entries for pins in entry.pins) or any(
        "G" in entry.axes for entry in layout.entries
    )


def is_stacked(layout: Layout) -> bool:
    """Whether shared experts are stacked, one matrix each (Inkling)."""
    return any(entry.axes.startswith("N ") for entry in layout.entries)


def config_of(
    layout: Layout,
    shared: tuple[int, int] | None = None,
    latent: int | None = None,
    hashed: bool = False,
    **sizes_and_layouts: Any,
) -> MoEConfig:
    """Returns a config that a layout can store; shared: (intermediate size, count)."""
    activation: Any = "silu" if is_gated(layout) else "relu2_no_mul"
    gate: Any = "router" if is_stacked(layout) else "sigmoid" if holds(layout, "shared", "gate") else "none"
    router = RouterConfig(
        scoring="sigmoid",
        selection="hash" if hashed else "top_k",
        correction_bias="scores" if holds(layout, "router", "correction_bias") and not hashed else "none",
    )
    return MoEConfig(
        router=router,
        activation=activation,
        shared=shared
        and SharedExpertsConfig(intermediate_size=shared[0], count=shared[1], gate=gate, activation=activation),
        expert_norm=ExpertNormConfig() if holds(layout, "expert_norm") else None,
        latent=None if latent is None else LatentConfig(size=latent),
        zero_experts=_ZERO.get(layout.name),
        norms=NormsConfig(output=True) if layout.name == "axk1" else None,
        **sizes_and_layouts,
    )


@st.composite
def blocks(draw: Callable[[Any], Any], layouts: tuple[Layout, ...] = SAVED, slices: int = 1) -> Block:
    """Draws a block of any layout, sizes and dtype, with any weight layout in memory.

    slices: a divisor of the intermediate sizes.
    """
    layout = draw(st.sampled_from(layouts))
    sizes = st.integers(1, 4)
    shared = None
    if holds(layout, "shared", "down") and (is_stacked(layout) or draw(st.booleans())):
        shared = slices * draw(sizes), draw(sizes)
    hashed = holds(layout, "router", "expert_ids_of_token") and draw(st.booleans())
    latent = holds(layout, "latent", "input") and (layout.name == "muse_spark" or draw(st.booleans()))
    config = config_of(
        layout,
        shared,
        draw(sizes) if latent else None,
        hashed,
        num_experts=draw(st.integers(1, 5)),
        top_k=1,
        hidden_size=draw(sizes),
        intermediate_size=slices * draw(sizes),
        gate_up_layout=draw(st.sampled_from(["packed", "interleaved"])) if is_gated(layout) else "packed",
        weight_layout=draw(st.sampled_from(["out_in", "in_out"])),
    )
    prefix = ".".join(
        filter(None, [draw(st.sampled_from(["", "model.", "model.language_model."])) + "layers.3", layout.block])
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return Block(
        layout, config, weights_of(layout, config, draw(st.booleans()), draw(st.integers(0, 2**20)), dtype), prefix
    )


def weights_of(layout: Layout, config: MoEConfig, bias: bool, seed: int, dtype: torch.dtype) -> MoEWeights:
    """Returns weights that the layout can store: without tensors that it has no name for, and equal for all experts
    where it has one tensor for all.
    """
    made = weights_for(config, seed, dtype=dtype)
    leaves = dict(zip(WEIGHT_PATHS, leaves_of_weights(made), strict=True))
    for path, leaf in leaves.items():
        entries = [entry for entry in layout.entries if entry.weight == path]
        if leaf is None or not entries or (entries[0].optional and not bias):
            leaves[path] = None
        elif entries[0].offset:  # 1 + w is exact: w has 8 bits
            leaves[path] = 1 + leaf.float().mul(64).round() / 64
        if leaves[path] is not None and entries[0].axes == {
            "expert_norm": "X",
            "down_bias": "X",
            "expert_scale": "1",
        }.get(path[-1]):
            leaves[path] = leaves[path][:1].expand_as(leaf).contiguous()
    return weights_of_leaves(list(leaves.values()))


def adapter_of(config: MoEConfig, shared: bool, dtype: torch.dtype) -> LoRAWeights:
    """Returns one adapter of both products, of rank 2, which the experts may share."""
    sizes, generator = sizes_of(config), torch.Generator().manual_seed(5)
    experts, out = 1 if shared else config.num_experts, sizes["G"] * sizes["I"]
    shapes = ((2, sizes["X"]), (out, 2), (2, sizes["I"]), (sizes["X"], 2))
    a, b, c, d = (torch.randn(experts, m, n, generator=generator).to(dtype) for m, n in shapes)
    return make_lora(gate_up=(a, b), down=(c, d), alpha=2.0)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def bits(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, tuple(t.shape), t.contiguous().flatten().view(torch.uint8).tolist()


def same_bits(a: MoEWeights, b: MoEWeights) -> bool:
    """Whether the tensors have equal bits and dtypes."""
    pairs = zip(leaves_of_weights(a), leaves_of_weights(b), strict=True)
    return all((x is None) == (y is None) and (x is None or y is None or bits(x) == bits(y)) for x, y in pairs)


def as_config(block: Block, **changes: Any) -> MoEConfig:
    return dataclasses.replace(block.config, **changes)


def map_weights(function: Callable[[Tensor], Tensor], weights: MoEWeights) -> MoEWeights:
    return tree_map(lambda t: function(t) if isinstance(t, Tensor) else t, weights)  # type: ignore[no-any-return]


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    """Writes a safetensors file from raw parts; the header may be any text, and its stated length may be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """Returns header and data of a file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]
