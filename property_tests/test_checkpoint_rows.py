"""Every row of the layout table, and every name in it, is read from a file that transformers names: not only from what
we save.
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
    """Qwen3-VL as published."""
    return {name: t.transpose(1, 2).contiguous() if t.ndim == 3 else t for name, t in tensors.items()}


def in_one_tensor(tensors: Tensors) -> Tensors:
    """Qwen3.5 as published: the experts of a file that has them one by one."""
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


# Layouts that transformers reads or others write, but that it does not save: the family, and its file laid so by hand
# what is saved of the text model alone, which transformers converts nothing of
AS_IN_MEMORY = ("minimax_m3 fused", "inkling fused")
LAID_BY_HAND: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "qwen fused": ("qwen2_moe", in_one_tensor),
    "qwen fused, transposed": ("qwen2_moe", lambda tensors: transposed(in_one_tensor(tensors))),
}


def families_of(row: BlockRow) -> set[str]:
    return {row.family, str(make_config(row).model_type)} if row.config else {row.family}


def files_of(layout: Layout) -> list[tuple[BlockRow, Callable[[Tensors], Tensors]]]:
    """Blocks that may be in a layout, with what their files must become."""
    by_hand = LAID_BY_HAND.get(layout.name)
    laid = [(row, by_hand[1]) for row in ROWS if by_hand is not None and row.family == by_hand[0]]
    banks = "ernie4_5_vl_moe_bank" in layout.families
    saved = [
        row
        for row in ROWS
        if bool(row.path) == banks and (families_of(row) & set(layout.families) or (banks and row.path))
    ]
    return [*((row, lambda tensors: tensors) for row in saved), *laid]


def of_nllb(block: Any) -> tuple[MoEConfig, MoEWeights]:
    """transformers' block routes as no layer does, but its tensors are those of one."""
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
    """A bank of Ernie's block of two; the shared experts lie below that of text."""
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


def names_read(layout: Layout, row: BlockRow, lay: Callable[[Tensors], Tensors], folder: Path) -> set[str]:
    """The names of the layout that a block's file has, all held to the block's own tensors; none where it is in another
    layout.
    """
    whole = make_block(dataclasses.replace(row, path=""), 0)
    prefix = write(folder, dataclasses.replace(row, path=""), whole)
    if layout.name in AS_IN_MEMORY:
        save_file(
            {f"{prefix}.{name}": t.clone() for name, t in whole.state_dict().items()}, folder / "model.safetensors"
        )
    save_file(lay(load_file(folder / "model.safetensors")), folder / "model.safetensors")
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
}  # by tools that quantize: files of them are held to the blocks in `test_checkpoint_families`


@pytest.mark.parametrize(
    "layout", [layout for layout in LAYOUTS if layout.name not in TAKEN_APART], ids=lambda layout: layout.name
)
def test_every_name_of_a_layout_is_read_as_transformers_has_it(layout: Layout, tmp_path: Path) -> None:
    """A new row wants a family of transformers whose blocks are saved so, or a file laid so by hand: LAID_BY_HAND,
    APART.
    """
    missing = {entry.name for entry in layout.entries if not entry.optional}
    for place, (row, lay) in enumerate(files_of(layout)):
        if missing:
            folder = tmp_path / str(place)
            folder.mkdir()
            missing -= names_read(layout, row, lay, folder)
    assert not missing


def test_every_kind_of_optional_tensor_is_read_too(tmp_path: Path) -> None:
    """Biases, of which one function makes the rows of all families: in those whose configs can ask for them."""
    wanted = {(entry.weight, entry.pins) for layout in LAYOUTS for entry in layout.entries if entry.optional}
    for layout in (layout for layout in LAYOUTS if layout.name in ("ernie4_5", "nemotron_h", "switch")):
        for row, lay in files_of(layout):
            folder = tmp_path / f"{layout.name} {row.name}"
            folder.mkdir()
            names = names_read(layout, row, lay, folder)
            wanted -= {(entry.weight, entry.pins) for entry in layout.entries if entry.name in names}
    assert not wanted
