"""Blocks of every family, saved under transformers' names, load as configs and weights that compute the same."""

import contextlib
import dataclasses
import fnmatch
import json
import re
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from checkpoints import same_bits  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402
from transformers.core_model_loading import revert_weight_conversion  # noqa: E402

from moe_fn import MoEConfig, MoEWeights, moe_forward  # noqa: E402
from moe_fn.checkpoint import (  # noqa: E402
    LAYOUTS,
    Layout,
    load_moe_layer,
    load_moe_layers,
    load_moe_weights,
    moe_layers,
    save_moe_weights,
)
from moe_fn.families import FAMILIES, config_of_layer  # noqa: E402
from moe_fn.integrations.transformers import from_block  # noqa: E402
from shared_tests.zoo import TOKEN_CHOICE, BlockRow, make_block, make_config, make_input, randomise, run_block  # noqa: E402
from shared_tests.zoo.build import module_of  # noqa: E402
from shared_tests.zoo.params import each_row  # noqa: E402

# Name of the block in its layer, where it is not mlp
BLOCK_OF_FAMILY = {
    "jamba": ".feed_forward", "lfm2_moe": ".feed_forward", "llama4": ".feed_forward", "nemotron_h": ".mixer",
    "dbrx": ".ffn", "gemma4": "",
    "diffusion_gemma": "", "nllb_moe": ".ffn", "granitemoe": ".block_sparse_moe", "granitemoe_swa": ".block_sparse_moe",
    "granitemoeshared": ".block_sparse_moe", "granitemoehybrid": ".block_sparse_moe",
}  # fmt: skip
WHOLE_BLOCKS = [row for row in TOKEN_CHOICE if row.family != "ernie4_5_vl_moe"]
BANKS = [row for row in TOKEN_CHOICE if row.path]
# transformers has the number of experts of each layer of these towers in per_layer_config
BY_CONFIG = [row for row in WHOLE_BLOCKS if not row.name.startswith("dots3_note-vision")]


def layer_of(row: BlockRow) -> int:
    return row.args[-1] if row.args else 1


def on_disk(row: BlockRow, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the names and tensors that save_pretrained writes."""
    names = dict.fromkeys((row.family, str(make_config(row).model_type), f"{row.family}_mm_model", row.block))
    conversions = [conversion for name in names for conversion in get_checkpoint_conversion_mapping(name) or ()]
    model = SimpleNamespace(
        _weight_conversions=conversions or None, config=make_config(row), get_parameter=tensors.__getitem__
    )
    return dict(revert_weight_conversion(model, tensors)) if conversions else tensors  # type: ignore[arg-type]


def write(folder: Path, row: BlockRow, block: torch.nn.Module) -> str:
    """Writes a checkpoint of one block, and returns its prefix."""
    prefix = f"model.layers.{layer_of(row)}{BLOCK_OF_FAMILY.get(row.family, '.mlp')}"
    state = {f"{prefix}.{name}": t.contiguous().clone() for name, t in block.state_dict().items()}
    save_file({name: t.contiguous() for name, t in on_disk(row, state).items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(make_config(row).to_dict()))
    return prefix


def check(row: BlockRow, block: Any, config: MoEConfig, weights: MoEWeights) -> None:
    """Checks that the layer of these weights computes the same as the block."""
    x = make_input(row, 1)
    with torch.no_grad():
        wanted = run_block(row, block, x)
        logits = block.gate(x, wanted.router_states)[0].view(*x.shape[:2], -1) if row.family == "zaya" else None
        y = moe_forward(config, weights, x, logits, token_ids=wanted.token_ids)
    expected = wanted.y if wanted.after_norm is None else wanted.after_norm
    assert (y - expected).norm() <= 1e-5 * expected.norm()


@each_row(BY_CONFIG)
def test_a_block_on_disk_is_the_block(row: BlockRow, tmp_path: Path) -> None:
    block = make_block(row, 0)
    write(tmp_path, row, block)
    assert [(layer.index, layer.problem) for layer in moe_layers(tmp_path)] == [(layer_of(row), None)]
    config, weights = load_moe_layer(tmp_path, layer_of(row))
    of_block = from_block(block)
    assert config == of_block[0] and same_bits(weights, of_block[1])
    check(row, block, config, weights)


@each_row(BY_CONFIG)
def test_saving_writes_the_file_that_was_read(row: BlockRow, tmp_path: Path) -> None:
    """Names and bits are the same, except tensors that are not part of a layer, and norms that are stored minus 1."""
    prefix = write(tmp_path, row, make_block(row, 0))
    (found,) = moe_layers(tmp_path)
    layout = next(layout for layout in LAYOUTS if layout.name == found.layout)
    config, weights = load_moe_layer(tmp_path, found.prefix)
    if not layout.savable:
        with pytest.raises(ValueError, match="more than a block"):
            save_moe_weights(tmp_path / "again", found.prefix, config, weights, layout=layout)
        return
    save_moe_weights(tmp_path / "again", found.prefix, config, weights, layout=layout)
    read, written = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    outside = {name for name in read if not name.startswith(found.prefix)} if prefix == found.prefix else set()
    assert set(written) <= set(read) and set(read) - set(written) - outside <= set(
        not_of_the_layer(layout, found.prefix, read)
    )
    for name, t in written.items():
        exact = not name.endswith(("pre_expert_norm.weight", "post_expert_norm.weight"))
        assert torch.equal(t, read[name]) if exact else torch.allclose(t, read[name], atol=1e-7), name


def not_of_the_layer(layout: Layout, prefix: str, names: Iterable[str]) -> list[str]:
    patterns = [f"{prefix}.{other}".replace("{z}", "*").replace("{second}", "*") for other in layout.others]
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


@pytest.mark.parametrize("row", BANKS, ids=lambda row: row.name)
def test_a_bank_of_a_block_of_two_computes_what_it_does(row: BlockRow, tmp_path: Path) -> None:
    whole = make_block(dataclasses.replace(row, path=""), 0)
    prefix = write(tmp_path, dataclasses.replace(row, path=""), whole)
    bank = row.path == "vision_moe"
    values = make_config(row).to_dict()
    values |= {"model_type": "ernie4_5_vl_moe_bank", "moe_intermediate_size": values["moe_intermediate_size"][bank]}
    config = config_of_layer(values, layer_of(row))
    layout = "ernie4_5_vl, images" if bank else "ernie4_5_vl, text"
    check(row, whole.get_submodule(row.path), config, load_moe_weights(tmp_path, prefix, config, layout=layout))


def test_experts_of_qwen3_vl_are_read_in_both_layouts(tmp_path: Path) -> None:
    """They are transposed in the published files, and not in files that transformers saves."""
    row = next(row for row in TOKEN_CHOICE if row.family == "qwen3_vl_moe")
    block = make_block(row, 0)
    write(tmp_path, row, block)
    assert moe_layers(tmp_path)[0].layout == "qwen fused"
    tensors = {
        name: t.transpose(1, 2).contiguous() if t.ndim == 3 else t
        for name, t in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert moe_layers(tmp_path)[0].layout == "qwen fused, transposed"
    check(row, block, *load_moe_layer(tmp_path, 1))


def taken_apart(tensors: dict[str, Tensor], prefix: str, weights: MoEWeights, experts: str) -> dict[str, Tensor]:
    """Returns experts one by one, as quantization tools save them, from packed weights [E, out, in]."""
    found = {name: t for name, t in tensors.items() if not re.search(r"\.experts\.(gate_up|down|fc[12])|_linear", name)}
    for e in range(len(weights.down)):
        halves = dict(zip(("gate_proj", "up_proj"), weights.gate_up[e].chunk(2), strict=True)) | {
            "down_proj": weights.down[e]
        }
        found |= {f"{prefix}.{experts}.{e}.{name}.weight": t.contiguous() for name, t in halves.items()}
        if weights.gate_up_bias is not None and weights.down_bias is not None:
            halves = dict(zip(("gate_proj", "up_proj"), weights.gate_up_bias[e].chunk(2), strict=True)) | {
                "down_proj": weights.down_bias[e]
            }
            found |= {f"{prefix}.{experts}.{e}.{name}.bias": t.contiguous() for name, t in halves.items()}
    return found


APART = [
    ("gemma4", "experts", {}, "gemma4, one by one"),
    ("gemma4", "moe.experts", {}, "gemma4 moe"),
    ("gemma4", "moe.experts", {"router.per_expert_scale": "moe.per_expert_scale"}, "gemma4 moe, its scale"),
    ("granitemoe", "experts", {}, "granite, one by one"),
    ("granitemoehybrid", "experts", {"router.layer.weight": "router.weight"}, "granite fused, one by one"),
    ("granitemoe_swa", "experts", {}, "granite fused, one by one"),
    *((family, "experts", {}, f"{name}, one by one") for family, name in (
        ("gpt_oss", "gpt_oss"), ("openai_privacy_filter", "openai_privacy_filter"), ("llama4", "llama4"),
        ("aria", "aria"),
        ("hy_v4", "hy_v4"), ("muse_spark", "muse_spark"), ("zaya", "zaya"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "experts", "renamed", "layout"), APART, ids=[f"{row[3]}, {row[0]}" for row in APART]
)
def test_experts_taken_apart_are_the_block(
    family: str, experts: str, renamed: dict[str, str], layout: str, tmp_path: Path
) -> None:
    row = next(row for row in WHOLE_BLOCKS if row.family == family)
    block = make_block(row, 0)
    write(tmp_path, row, block)
    (found,) = moe_layers(tmp_path)
    assert found.config is not None
    packed = dataclasses.replace(found.config, gate_up_layout="packed", weight_layout="out_in")
    apart = taken_apart(
        load_file(tmp_path / "model.safetensors"),
        found.prefix,
        load_moe_weights(tmp_path, found.prefix, packed),
        experts,
    )
    names = {f"{found.prefix}.{old}": f"{found.prefix}.{new}" for old, new in renamed.items()}
    save_file({names.get(name, name): t for name, t in apart.items()}, tmp_path / "model.safetensors")
    assert [(layer.layout, layer.prefix, layer.problem) for layer in moe_layers(tmp_path)] == [
        (layout, found.prefix, None)
    ]
    check(row, block, *load_moe_layer(tmp_path, layer_of(row)))


# Whole models as save_pretrained writes them, in many shards: arguments in addition to those of the zoo's blocks
TINY = {
    "vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "gemma4": {"vocab_size_per_layer_input": 40},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["full_attention", "full_attention"]},
    "dbrx": {"attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0}, "n_layers": 2, "n_heads": 2},
}
MODELS = (
    "mixtral", "minimax", "jamba", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "hunyuan_v1_moe",
    "ernie4_5_moe",
    "longcat_flash", "deepseek_v2", "gemma4", "gpt_oss", "granitemoe", "granitemoehybrid", "aria", "cohere2_moe",
    "jetmoe", "deepseek_v3",
    "glm4_moe", "dots1", "kimi_linear", "exaone_moe", "axk1", "hy_v4", "nemotron_h", "minimax_m2", "minimax_m3_vl",
    "laguna", "afmoe",
    "hy_v3", "kolibri1", "lfm2_moe", "inkling", "inkling2", "llama4", "phimoe", "dbrx",
)  # fmt: skip
WHOLE = [next(row for row in WHOLE_BLOCKS if row.family == family) for family in MODELS]


@pytest.mark.parametrize("row", WHOLE, ids=lambda row: row.name)
def test_a_saved_model_comes_back(row: BlockRow, tmp_path: Path) -> None:
    values = {**TINY, **row.sizes, **row.options, **MORE.get(row.family, {})}
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(module_of(row, "configuration"), row.config)(**values)
    )
    randomise(model.float(), 0)
    model.eval().set_experts_implementation("eager")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    layers = moe_layers(tmp_path)
    blocks = [module for module in model.modules() if type(module).__name__ == row.block]
    assert len(blocks) == len(layers) and all(layer.problem is None for layer in layers)
    for block, (prefix, config, weights) in zip(blocks, load_moe_layers(tmp_path, progress=False), strict=True):
        fused = getattr(getattr(block, "experts", None), "gate_up_proj", None)
        assert fused is None or row.family == "longcat_flash" or torch.equal(weights.gate_up, fused), prefix
        check(row, block, config, weights)


JUNK = (None, "x", [1], [], {}, {"a": 1}, -1, 0, 1e99, True, 2.5, 10**30, 10**400, float("inf"), float("nan"))


@pytest.mark.parametrize(
    "family", ["mixtral", "deepseek_v3", "ernie4_5_moe", "gpt_oss", "mistral4", "inkling", "nemotron_h", "dbrx"]
)
def test_no_config_is_a_crash(family: str) -> None:
    values = make_config(next(row for row in WHOLE_BLOCKS if row.family == family)).to_dict()
    for name in values:
        for value in JUNK:
            with contextlib.suppress(ValueError):
                assert config_of_layer({**values, name: value}, 1).num_experts > 0
    if family == "mixtral":
        with pytest.raises(
            ValueError,
            match="hidden_size or d_model is None in the model's config; expected an int, the hidden_size",
        ):
            config_of_layer({**values, "hidden_size": None}, 1)


def test_every_family_has_a_layout() -> None:
    known = {name for layout in LAYOUTS for name in layout.families}
    for family in FAMILIES:
        assert family.refused or set(family.names) <= known, family.names
