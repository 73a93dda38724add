"""Every layout, and every name in it, is read from a file whose names are transformers', not only from files that
moe_fn saved.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from checkpoints import same_bits  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_checkpoint_families import APART, write  # noqa: E402

from moe_fn import MoEConfig, MoEWeights, RouterWeights, SharedExpertsConfig, SharedWeights  # noqa: E402
from moe_fn.checkpoint import LAYOUTS, Layout, load_moe_weights, moe_layers  # noqa: E402
from moe_fn.checkpoint.choose_layout import headers_of_block, plan_of_block  # noqa: E402
from moe_fn.checkpoint.folder import open_checkpoint  # noqa: E402
from moe_fn.integrations.transformers import from_block  # noqa: E402
from shared_tests.zoo import ROWS, BlockRow, make_block  # noqa: E402
from shared_tests.zoo.build import make_config  # noqa: E402

Tensors = dict[str, Tensor]


def transposed(tensors: Tensors) -> Tensors:
    """Qwen3-VL's published layout."""
    return {name: t.transpose(1, 2).contiguous() if t.ndim == 3 else t for name, t in tensors.items()}


def in_one_tensor(tensors: Tensors) -> Tensors:
    """Qwen3.5's published layout, from a file with the experts one by one."""
    found = {name: t for name, t in tensors.items() if ".experts." not in name}
    of_experts: dict[str, list[Tensor]] = {}
    for name, t in sorted(
        tensors.items(), key=lambda item: [int(part) if part.isdecimal() else part for part in item[0].split(".")]
    ):
        if at := re.search(r"\.experts\.\d+\.", name):
            of_experts.setdefault(f"{name[: at.start()]}.experts.{name[at.end() :]}", []).append(t)
    gate = next(name for name in of_experts if name.endswith("gate_proj.weight"))
    gates, ups, downs = (
        torch.stack(of_experts[gate.replace("gate_proj", name)]) for name in ("gate_proj", "up_proj", "down_proj")
    )
    prefix = gate.removesuffix("gate_proj.weight")
    return found | {f"{prefix}gate_up_proj": torch.cat([gates, ups], 1), f"{prefix}down_proj": downs}


# Layouts of a text model that is saved alone, with the names that it has in memory
AS_IN_MEMORY = ("minimax_m3 fused", "inkling fused")
# Layouts that transformers reads, but does not save: the family, and a function that converts its file
CONVERTED: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "qwen fused": ("qwen2_moe", in_one_tensor),
    "qwen fused, transposed": ("qwen2_moe", lambda tensors: transposed(in_one_tensor(tensors))),
}


def families_of(row: BlockRow) -> set[str]:
    return {row.family, str(make_config(row).model_type)} if row.config else {row.family}


def files_of(layout: Layout) -> list[tuple[BlockRow, Callable[[Tensors], Tensors]]]:
    """Returns blocks that may be in a layout, with functions that convert their files to it."""
    converted = CONVERTED.get(layout.name)
    written = [(row, converted[1]) for row in ROWS if converted is not None and row.family == converted[0]]
    banks = "ernie4_5_vl_moe_bank" in layout.families
    saved = [
        row
        for row in ROWS
        if bool(row.path) == banks and (families_of(row) & set(layout.families) or (banks and row.path))
    ]
    return [*((row, lambda tensors: tensors) for row in saved), *written]


def of_nllb(block: Any) -> tuple[MoEConfig, MoEWeights]:
    """transformers' block routes differently from any layer, but has the tensors of one."""
    classifier, experts = (
        block.router.classifier,
        [expert for name, expert in block.experts.items() if name.startswith("expert_")],
    )
    names = {"gate_up": "fc1.weight", "down": "fc2.weight", "gate_up_bias": "fc1.bias", "down_bias": "fc2.bias"}
    found = {
        name: torch.stack([expert.get_parameter(theirs).detach() for expert in experts])
        for name, theirs in names.items()
    }
    config = MoEConfig(
        num_experts=len(experts), top_k=2, hidden_size=32, intermediate_size=found["down"].shape[2],
        activation="relu2_no_mul",
    )  # fmt: skip
    router = RouterWeights(
        gate=classifier.weight.detach(), bias=None if classifier.bias is None else classifier.bias.detach()
    )
    return config, MoEWeights(**found, router=router)


def of_bank(row: BlockRow, whole: Any) -> tuple[MoEConfig, MoEWeights]:
    """One of the two banks of Ernie's block; the text bank has the shared experts."""
    config, weights = from_block(whole.get_submodule(row.path))
    if row.path != "text_moe":
        return config, weights
    shared = whole.shared_experts
    gate_up, down = (
        torch.cat([shared.gate_proj.weight, shared.up_proj.weight]).detach(),
        shared.down_proj.weight.detach(),
    )
    shared_config = SharedExpertsConfig(intermediate_size=down.shape[1])
    return dataclasses.replace(config, shared=shared_config), dataclasses.replace(
        weights, shared=SharedWeights(gate_up=gate_up, down=down)
    )


def names_read(layout: Layout, row: BlockRow, convert: Callable[[Tensors], Tensors], folder: Path) -> set[str]:
    """Returns the names of the layout that a block's file has, after comparing the loaded weights with the block; an
    empty set if the file has another layout.
    """
    whole = make_block(dataclasses.replace(row, path=""), 0)
    prefix = write(folder, dataclasses.replace(row, path=""), whole)
    if layout.name in AS_IN_MEMORY:
        save_file(
            {f"{prefix}.{name}": t.clone() for name, t in whole.state_dict().items()}, folder / "model.safetensors"
        )
    save_file(convert(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    (prefix,) = {layer.prefix for layer in moe_layers(folder)}
    config, weights = (
        of_bank(row, whole) if row.path else of_nllb(whole) if row.family == "nllb_moe" else from_block(whole)
    )
    checkpoint = open_checkpoint(folder)
    try:
        plan = plan_of_block(checkpoint, headers_of_block(checkpoint, prefix), prefix, config, layout)
    except ValueError:
        return set()
    assert same_bits(load_moe_weights(folder, prefix, config, layout=layout), weights), row.name
    return {part.entry.name for parts in plan.parts.values() for part in parts}


TAKEN_APART = {
    layout for _, _, _, layout in APART
}  # by quantization tools; `test_checkpoint_families` compares such files with blocks


@pytest.mark.parametrize(
    "layout", [layout for layout in LAYOUTS if layout.name not in TAKEN_APART], ids=lambda layout: layout.name
)
def test_every_name_of_a_layout_is_read_as_transformers_has_it(layout: Layout, tmp_path: Path) -> None:
    """A new row needs a family of transformers that saves this layout, or a conversion in CONVERTED or APART."""
    missing = {entry.name for entry in layout.entries if not entry.optional}
    for place, (row, convert) in enumerate(files_of(layout)):
        if missing:
            folder = tmp_path / str(place)
            folder.mkdir()
            missing -= names_read(layout, row, convert, folder)
    assert not missing


def test_every_kind_of_optional_tensor_is_read_too(tmp_path: Path) -> None:
    """Biases, whose entries one function makes for all families, in families whose configs have an option for them."""
    wanted = {(entry.weight, entry.pins) for layout in LAYOUTS for entry in layout.entries if entry.optional}
    for layout in (layout for layout in LAYOUTS if layout.name in ("ernie4_5", "nemotron_h", "switch")):
        for row, convert in files_of(layout):
            folder = tmp_path / f"{layout.name} {row.name}"
            folder.mkdir()
            names = names_read(layout, row, convert, folder)
            wanted -= {(entry.weight, entry.pins) for entry in layout.entries if entry.name in names}
    assert not wanted
