"""Quantized checkpoints: every documented format, element by element; slices of ranks; contradictory and unknown
configs.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantized_files
import torch
from checkpoints import same_bits
from quantized_files import FORMATS, PREFIX, WIDTH, WORDS, E, Written, X, group, mx, plain_fp8, save, save_words, write

from moe_fn import (
    MoEConfig,
    MoEWeights,
    ParallelConfig,
    QuantConfig,
    RankGroup,
    RouterConfig,
    dequantize_weights,
    moe_forward,
    shard_weights,
)
from moe_fn.checkpoint import load_moe_layer, load_moe_weights, moe_layers, read_plan, save_moe_weights
from moe_fn.checkpoint.__main__ import main
from moe_fn.checkpoint.quantized import compressed_tensors, formats
from moe_fn.checkpoint.quantized.methods import method_of
from moe_fn.weights.check import check_weights

pytestmark = pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed")


def decoded(config: MoEConfig, weights: MoEWeights) -> MoEWeights:
    """Returns dequantized weights of a layer, or of a rank's slices, which are the weights of a smaller layer."""
    experts, inner = (
        weights.gate_up.shape[0],
        weights.down.shape[2] * (1 if config.quant is None else config.quant.per_byte),
    )
    own = dataclasses.replace(
        config, num_experts=experts, intermediate_size=inner, top_k=1, router=RouterConfig(), parallel=None
    )
    return dequantize_weights(own, weights)[1]


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_read_number_by_number(name: str, tmp_path: Path) -> None:
    written = write(tmp_path, FORMATS[name])
    config, weights = load_moe_layer(tmp_path, 1)
    assert config.quant == FORMATS[name].quant
    check_weights("test", config, weights, torch.zeros(1, config.hidden_size))
    floats = decoded(config, weights)
    assert torch.equal(floats.gate_up, written.gate_up) and torch.equal(floats.down, written.down)
    assert weights.shared is not None
    assert torch.equal(weights.shared.gate_up, written.shared_gate_up) and torch.equal(
        weights.shared.down, written.shared_down
    )
    if config.quant is not None and config.quant.activations is not None and config.quant.activations.static:
        assert weights.quant is not None
        assert torch.equal(weights.quant.gate_up_input_scale, torch.full((E,), 0.25))  # type: ignore[arg-type]
        assert torch.equal(weights.quant.down_input_scale, torch.full((E,), 0.25))  # type: ignore[arg-type]
    (layer,) = moe_layers(tmp_path)
    assert layer.problem is None and layer.config == config


def test_every_stored_format_is_read_by_a_test() -> None:
    """In addition to the formats here: DeepSeek-V4's experts (`test_checkpoint_published`) and those of gpt-oss."""
    found = [
        method_of({"quant_method": "modelopt", **made.words}, f"{PREFIX}.experts.0.up_proj", True)
        for made in FORMATS.values()
    ]
    assert {method.stored for method in found if method is not None} | {"fp4", "mxfp4 blocks"} == set(formats.FORMATS)
    layouts = {
        (made.words.get("format"), method.quant.scheme)
        for made, method in zip(FORMATS.values(), found, strict=True)
        if method
    }
    assert set(compressed_tensors._FORMATS) <= layouts


@pytest.mark.parametrize(("name", "row"), [("autofp8", "fp8"), ("deepseek", "fp8"), ("transformers mxfp8", "mxfp8")])
def test_writers_have_several_names_for_a_tensor(name: str, row: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    written = write(tmp_path, FORMATS[name])
    tensors = load_file(tmp_path / "model.safetensors")
    for names in (entry.suffix for entry in formats.FORMATS[row]):
        ends = {end: re.compile("|".join(f"{re.escape(other)}$" for other in names)) for end in names}
        for end, any_end in ends.items():
            save(tmp_path, {any_end.sub(end, tensor): t for tensor, t in tensors.items()})
            assert torch.equal(decoded(*load_moe_layer(tmp_path, 1)).gate_up, written.gate_up), end


@pytest.mark.parametrize("name", FORMATS)
def test_slices_of_a_rank_are_those_of_the_whole(name: str, tmp_path: Path) -> None:
    """Experts in any order, repeats allowed; a third of the intermediates. Blocks that do not divide it are
    an error.
    """
    written = write(tmp_path, FORMATS[name], shards=3)
    config, whole = load_moe_layer(tmp_path, 1)
    experts, start, stop = (2, 0, 2), WIDTH // 3, 2 * WIDTH // 3
    cut: dict[str, Any] = {
        "experts": experts,
        "intermediate": slice(start, stop),
        "shared_intermediate": slice(start, stop),
    }
    if name == "deepseek, ragged":
        with pytest.raises(
            ValueError, match=r"intermediate is 32..64; expected multiples of (40|48), which share a scale or a byte"
        ):
            load_moe_weights(tmp_path, PREFIX, config, **cut)
        cut = {"experts": experts}
        start, stop = 0, WIDTH
    mine = load_moe_weights(tmp_path, PREFIX, config, **cut)
    floats = decoded(config, mine)
    rows = [*range(start, stop), *range(WIDTH + start, WIDTH + stop)]
    assert torch.equal(floats.gate_up, written.gate_up[list(experts)][:, rows])
    assert torch.equal(floats.down, written.down[list(experts)][:, :, start:stop])
    assert mine.shared is not None and whole.shared is not None
    assert torch.equal(mine.shared.gate_up, written.shared_gate_up[rows])
    assert torch.equal(mine.shared.down, written.shared_down[:, start:stop])
    own = dataclasses.replace(config, num_experts=3, intermediate_size=stop - start, shared=None, router=RouterConfig())
    check_weights("test", own, dataclasses.replace(mine, shared=None, router=None), torch.zeros(1, config.hidden_size))


CUTS = ((0, 1), (3, 8), (2, 12), (16, 40), (7, 95), (20, 96), (40, 80), (48, 96), (80, 96))


@pytest.mark.parametrize("name", FORMATS)
def test_slices_end_where_tiles_do_or_are_refused(name: str, tmp_path: Path) -> None:
    """Slices end inside an int32 of the file, at the ragged end, and inside a tile: the last is an error for experts,
    which remain codes, and not for shared experts.
    """
    written = write(tmp_path, FORMATS[name])
    config, _ = load_moe_layer(tmp_path, 1)
    assert config.quant is not None
    unit = math.lcm(*(size or 1 for size in config.quant.tile), config.quant.per_byte)
    refused = 0
    for start, stop in CUTS:
        cut: dict[str, Any] = {"shared_intermediate": slice(start, stop), "experts": (1,)}
        if start % unit == 0 and (stop % unit == 0 or stop == WIDTH):
            cut["intermediate"] = slice(start, stop)
        else:
            refused += 1
            with pytest.raises(
                ValueError,
                match=rf"intermediate is {start}..{stop}; expected multiples of \d+, which share a scale or a byte",
            ):
                load_moe_weights(tmp_path, PREFIX, config, intermediate=slice(start, stop))
        mine, rows = (
            load_moe_weights(tmp_path, PREFIX, config, **cut),
            [*range(start, stop), *range(WIDTH + start, WIDTH + stop)],
        )
        assert mine.shared is not None
        assert torch.equal(mine.shared.gate_up, written.shared_gate_up[rows]), (start, stop)
        assert torch.equal(mine.shared.down, written.shared_down[:, start:stop]), (start, stop)
        if "intermediate" in cut:
            floats = decoded(config, mine)
            assert torch.equal(floats.gate_up, written.gate_up[1:2, rows]), (start, stop)
            assert torch.equal(floats.down, written.down[1:2, :, start:stop]), (start, stop)
    assert (refused == 0) == (unit == 1)


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_part_is_that_of_the_whole(name: str, tmp_path: Path) -> None:
    """Loading with config.parallel gives the codes, scales and decoded floats of shard_weights; where those cannot be
    cut, the config is an error.
    """
    write(tmp_path, FORMATS[name], shards=2)
    _, whole = load_moe_layer(tmp_path, 1)
    for tp, ep in ((2, 1), (4, 1), (3, 2)):
        groups = {
            "tp": RankGroup(name="0", size=tp, rank=tp - 1),
            "ep": RankGroup(name="1", size=ep, rank=0) if ep > 1 else None,
        }
        try:
            config, mine = load_moe_layer(tmp_path, 1, parallel=ParallelConfig(**groups))
        except ValueError as error:
            assert "expected slices of a multiple of " in str(error)
        else:
            assert same_bits(mine, shard_weights(config, whole)), (tp, ep)


def test_bytes_are_cut_where_words_are_not(tmp_path: Path) -> None:
    """A slice needs four of the eight codes in an int32: whole int32 are read, and only the slice is kept."""
    made = FORMATS["ct w8a16"]
    written = write(tmp_path, made)
    config, _ = load_moe_layer(tmp_path, 1)
    mine = load_moe_weights(tmp_path, PREFIX, config, intermediate=slice(16, 48), shared_intermediate=slice(16, 48))
    assert torch.equal(decoded(config, mine).down, written.down[:, :, 16:48])
    for name, columns in (
        ("ct fp8 channel", slice(3, 8)),
        ("ct w4a16 channel", slice(2, 12)),
        ("ct fp8 tensor", slice(5, 6)),
    ):
        folder = tmp_path / name
        folder.mkdir()
        written = write(folder, FORMATS[name])
        config, _ = load_moe_layer(folder, 1)
        mine = load_moe_weights(folder, PREFIX, config, intermediate=columns)
        assert torch.equal(decoded(config, mine).down, written.down[:, :, columns])
    with pytest.raises(
        ValueError, match=r"intermediate is 3..8; expected multiples of 2, which share a scale or a byte"
    ):
        load_moe_weights(
            tmp_path / "ct w4a16 channel",
            PREFIX,
            load_moe_layer(tmp_path / "ct w4a16 channel", 1)[0],
            intermediate=slice(3, 8),
        )


def test_gates_and_ups_keep_their_own_scales(tmp_path: Path) -> None:
    """Codes and scales are bitwise those of the file; no weight is requantized."""
    write(tmp_path, FORMATS["modelopt nvfp4"])
    _, weights = load_moe_layer(tmp_path, 1)
    from safetensors.torch import load_file

    file = load_file(tmp_path / "model.safetensors")
    assert (
        weights.quant is not None
        and weights.quant.gate_up_scale is not None
        and weights.quant.gate_up_global_scale is not None
    )
    for half, name in enumerate(("gate_proj", "up_proj")):
        module, rows = f"{PREFIX}.experts.1.{name}", slice(half * WIDTH, (half + 1) * WIDTH)
        assert torch.equal(weights.gate_up[1, rows], file[f"{module}.weight"])
        scale = weights.quant.gate_up_scale[1, rows]
        assert torch.equal(scale.view(torch.uint8), file[f"{module}.weight_scale"].view(torch.uint8))
        assert weights.quant.gate_up_global_scale[1, half, 0] == file[f"{module}.weight_scale_2"]
    assert weights.quant.gate_up_global_scale[1, 0, 0] != weights.quant.gate_up_global_scale[2, 0, 0]


def test_a_quantized_layer_computes_what_its_floats_do(tmp_path: Path) -> None:
    write(tmp_path, FORMATS["ct w4a16 zeros"])
    config, weights = load_moe_layer(tmp_path, 1)
    x = torch.randn(5, config.hidden_size)
    expected = moe_forward(*dequantize_weights(config, weights), x)
    assert torch.allclose(moe_forward(config, weights, x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


GPT_OSS = {
    "model_type": "gpt_oss", "num_local_experts": E, "num_experts_per_tok": 1, "hidden_size": X,
    "intermediate_size": WIDTH,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router",
    "lm_head"]},
}  # fmt: skip


def test_gpt_oss_is_read_number_by_number(tmp_path: Path) -> None:
    """All experts are in one tensor, in blocks of 16 bytes, with gates and ups interleaved."""
    random = np.random.default_rng(0)
    lay = mx(("_blocks", "_scales"), 4, blocks=True)
    matrices = {
        name: [lay(random, *size) for _ in range(E)]
        for name, size in (("gate_up_proj", (2 * WIDTH, X)), ("down_proj", (X, WIDTH)))
    }
    tensors = {
        f"{PREFIX}.experts.{name}{suffix}": torch.stack([matrix.tensors[suffix] for matrix in found])
        for name, found in matrices.items()
        for suffix in ("_blocks", "_scales")
    }
    tensors |= {
        f"{PREFIX}.experts.gate_up_proj_bias": torch.randn(E, 2 * WIDTH),
        f"{PREFIX}.experts.down_proj_bias": torch.randn(E, X),
    }
    tensors |= {f"{PREFIX}.router.weight": torch.randn(E, X), f"{PREFIX}.router.bias": torch.randn(E)}
    save(tmp_path, tensors)
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS))
    config, weights = load_moe_layer(tmp_path, 1)
    assert (
        config.quant == QuantConfig(scheme="mxfp4", granularity="group", group_size=32)
        and config.gate_up_layout == "interleaved"
    )
    expected = {
        name: torch.stack([torch.from_numpy(matrix.floats) for matrix in found]) for name, found in matrices.items()
    }
    floats = decoded(config, weights)
    assert torch.equal(floats.gate_up, expected["gate_up_proj"]) and torch.equal(floats.down, expected["down_proj"])
    part = load_moe_weights(tmp_path, PREFIX, config, experts=(2,), intermediate=slice(32, 64))
    assert torch.equal(decoded(config, part).gate_up, expected["gate_up_proj"][2:, 64:128])
    assert torch.equal(decoded(config, part).down, expected["down_proj"][2:, :, 32:64])
    packed_config = dataclasses.replace(config, gate_up_layout="packed")
    whole = load_moe_weights(tmp_path, PREFIX, packed_config)
    assert torch.equal(
        decoded(packed_config, whole).gate_up,
        expected["gate_up_proj"].unflatten(1, (WIDTH, 2)).transpose(1, 2).flatten(1, 2),
    )


APART: dict[str, tuple[dict[str, Any], str, str, dict[str, Any]]] = {
    "granite": (
        {"model_type": "granitemoehybrid", "num_local_experts": E, "num_experts_per_tok": 1, "hidden_size": X,
        "intermediate_size": WIDTH},
        "model.layers.1.block_sparse_moe", "experts", {"router.layer.weight": torch.ones(E, X)},
    ),
    **{
        f"gemma-4, {experts}": (
            {"model_type": "gemma4", "text_config": {
                "model_type": "gemma4_text", "num_experts": E, "top_k_experts": 1, "hidden_size": X,
                "moe_intermediate_size": WIDTH,
                "enable_moe_block": True, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
            }},
            "model.language_model.layers.1", experts,
            {
                "router.proj.weight": torch.ones(E, X), "router.scale": torch.ones(X),
                "router.per_expert_scale": torch.ones(E),
                "pre_feedforward_layernorm_2.weight": torch.ones(X),
                "post_feedforward_layernorm_2.weight": torch.ones(X),
                "self_attn.q_proj.weight": torch.ones(X, X),
            },
        )
        for experts in ("experts", "moe.experts")
    },
}  # fmt: skip


@pytest.mark.parametrize("method", ["ct nvfp4", "ct int8", "modelopt nvfp4", "gptq zeros"])
@pytest.mark.parametrize("case", APART)
def test_experts_that_tools_took_apart_are_read(case: str, method: str, tmp_path: Path) -> None:
    words, prefix, experts, tensors = APART[case]
    random, made = np.random.default_rng(0), FORMATS[method]
    sizes = {"gate_proj": (WIDTH, X), "up_proj": (WIDTH, X), "down_proj": (X, WIDTH)}
    found = {(e, name): made.lay(random, *size) for e in range(E) for name, size in sizes.items()}
    coded = {
        f"{prefix}.{experts}.{e}.{name}{end}": t
        for (e, name), matrix in found.items()
        for end, t in matrix.tensors.items()
    }
    save(tmp_path, {f"{prefix}.{name}": t for name, t in tensors.items()} | coded)
    save_words(tmp_path, made)
    quant = {} if made.hf_quant_config else {"quantization_config": made.words}
    (tmp_path / "config.json").write_text(json.dumps(words | quant))
    config, weights = load_moe_layer(tmp_path, 1)
    assert config.quant == made.quant and [layer.problem for layer in moe_layers(tmp_path)] == [None]
    floats = decoded(config, weights)
    down = [torch.from_numpy(found[e, "down_proj"].floats.astype(np.float32)) for e in range(E)]
    halves = [
        torch.from_numpy(
            np.concatenate([found[e, f"{half}_proj"].floats for half in ("gate", "up")]).astype(np.float32)
        )
        for e in range(E)
    ]
    assert torch.equal(floats.down, torch.stack(down)) and torch.equal(floats.gate_up, torch.stack(halves))


def test_deepseek_v4_has_experts_in_four_bits(tmp_path: Path) -> None:
    """Experts are in fp4, other weights in fp8; scales are powers of two, stored as bytes as `.scale` for
    weight_scale_inv.
    """
    random, prefix = np.random.default_rng(0), "layers.1.ffn"
    fp4 = mx((".weight", ".scale"), 4, e8m0=True, signed=True)
    made = {
        (e, name): fp4(random, *size)
        for e in range(E)
        for name, size in (("w1", (WIDTH, X)), ("w2", (X, WIDTH)), ("w3", (WIDTH, X)))
    }
    tensors = {
        f"{prefix}.experts.{e}.{name}{suffix}": t
        for (e, name), matrix in made.items()
        for suffix, t in matrix.tensors.items()
    }
    tensors[f"{prefix}.gate.weight"] = torch.randn(E, X)
    save(tmp_path, tensors)
    words = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0", "expert_dtype": "fp4"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v4", "quantization_config": words}))
    config = MoEConfig(num_experts=E, top_k=1, hidden_size=X, intermediate_size=WIDTH, quant=group("mxfp4", 32))
    weights = load_moe_weights(tmp_path, prefix, config)
    gates = torch.stack([torch.from_numpy(made[e, "w1"].floats) for e in range(E)])
    assert torch.equal(decoded(config, weights).gate_up[:, :WIDTH], gates)


def test_fused_fp8_experts(tmp_path: Path) -> None:
    """Files of transformers for families with all experts in one tensor; scales may be powers of two, stored
    as bytes.
    """
    random, prefix = np.random.default_rng(0), "model.layers.1.mlp"
    lay = plain_fp8(lambda n, k: (32, 16), ("", "_scale_inv", None))
    made = {
        name: [lay(random, *size) for _ in range(E)]
        for name, size in (("gate_up_proj", (2 * WIDTH, X)), ("down_proj", (X, WIDTH)))
    }
    tensors = {
        f"{prefix}.experts.{name}{suffix}": torch.stack([m.tensors[suffix] for m in found])
        for name, found in made.items()
        for suffix in ("", "_scale_inv")
    }
    save(tmp_path, tensors | {f"{prefix}.gate.weight": torch.randn(E, X)})
    words = {"quant_method": "fp8", "weight_block_size": [32, 16]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "quantization_config": words}))
    # the caller chooses how inputs are rounded
    quant = dataclasses.replace(FORMATS["deepseek"].quant, activations=None)
    config = MoEConfig(num_experts=E, top_k=1, hidden_size=X, intermediate_size=WIDTH, quant=quant)
    floats = decoded(config, load_moe_weights(tmp_path, prefix, config))
    assert torch.equal(floats.gate_up, torch.stack([torch.from_numpy(m.floats) for m in made["gate_up_proj"]]))
    words["weight_block_size"] = [36, 16]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "quantization_config": words}))
    config = dataclasses.replace(config, quant=dataclasses.replace(quant, block_shape=(36, 16)))
    with pytest.raises(ValueError, match=r"has elements for 36 positions along G I; expected 96 to be a multiple"):
        load_moe_weights(tmp_path, prefix, config)


def plain(folder: Path) -> Written:
    """Writes the tensors of a quantized model in float32, and keeps its quantization config."""
    made = write(folder, FORMATS["ct fp8 channel"])
    tensors = {f"{PREFIX}.gate.weight": torch.randn(E, X), f"{PREFIX}.gate.e_score_correction_bias": torch.zeros(E)}
    for module, gate_up, down in [
        *((f"experts.{e}", made.gate_up[e], made.down[e]) for e in range(E)),
        ("shared_experts", made.shared_gate_up, made.shared_down),
    ]:
        tensors |= {
            f"{PREFIX}.{module}.gate_proj.weight": gate_up[:WIDTH].contiguous(),
            f"{PREFIX}.{module}.up_proj.weight": gate_up[WIDTH:].contiguous(),
        }
        tensors |= {f"{PREFIX}.{module}.down_proj.weight": down}
    save(folder, tensors)
    return made


LISTS: dict[str, tuple[str, dict[str, Any]]] = {
    "regular expression": ("ct w4a16", {"ignore": ["lm_head", r"re:model\.layers\.1\..*"]}),
    "names": (
        "ct w4a16",
        {"ignore": [f"{PREFIX}.experts.{e}.{name}_proj" for e in range(E) for name in ("gate", "up", "down")]},
    ),
    "a parent": ("deepseek", {"modules_to_not_convert": ["lm_head", PREFIX]}),
    "a part": ("awq", {"modules_to_not_convert": ["mlp"]}),
    "transformers' patterns": ("deepseek", {"modules_to_not_convert": [r"model\.layers\.\d+\.mlp"]}),
    "a glob": ("modelopt fp8", {"ignore": ["model.layers.1*"]}),
    "no target": (
        "ct w4a16",
        {"config_groups": {"group_0": {"targets": [r"re:.*self_attn.*"], "weights": {"num_bits": 4}}}},
    ),
    "GPTQModel's exceptions": ("gptq", {"dynamic": {r"-:.*\.mlp\..*": {}}}),
}


@pytest.mark.parametrize("case", LISTS)
def test_layers_that_are_left_out_are_not_quantized(case: str, tmp_path: Path) -> None:
    name, changes = LISTS[case]
    expected = plain(tmp_path)
    save_words(tmp_path, FORMATS[name], **changes)
    for words in (changes, {}):  # layers that no list names may be floats too: the dtype in the file decides
        save_words(tmp_path, FORMATS[name], **words)
        config, weights = load_moe_layer(tmp_path, 1)
        assert config.quant is None and torch.equal(weights.gate_up, expected.gate_up) and weights.quant is None
        assert weights.shared is not None and torch.equal(weights.shared.down, expected.shared_down)
        assert moe_layers(tmp_path)[0].problem is None


@pytest.mark.parametrize("case", LISTS)
def test_codes_are_codes_whatever_a_list_says(case: str, tmp_path: Path) -> None:
    """Codes are an error where no key says their format, and where they contradict the config."""
    name, changes = LISTS[case]
    written = write(tmp_path, FORMATS[name], **changes)
    said = r"experts\.0.* is (F8_E4M3|I32|U8), but quantization_config excludes that module; expected floats"
    if case in ("no target", "GPTQModel's exceptions"):
        with pytest.raises(ValueError, match=said):
            load_moe_layer(tmp_path, 1)
        return
    assert torch.equal(decoded(*load_moe_layer(tmp_path, 1)).down, written.down)
    write(tmp_path, FORMATS["modelopt nvfp4" if name == "ct w4a16" else "ct w4a16"])
    save_words(tmp_path, FORMATS[name], **changes)
    (tmp_path / "hf_quant_config.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=said):
        load_moe_layer(tmp_path, 1)


def test_a_layer_is_quantized_as_a_whole(tmp_path: Path) -> None:
    made = FORMATS["ct w4a16"]
    floats = plain(tmp_path)
    write(tmp_path, made)
    edited(tmp_path, "experts.2.up_proj.weight", lambda _: floats.gate_up[2, WIDTH:].contiguous())
    with pytest.raises(
        ValueError,
        match=r"gate_proj is 'ct int4, packed', .* and .*experts.2.up_proj is not quantized; expected the same",
    ):
        load_moe_layer(tmp_path, 1)
    write(tmp_path, made)
    for e in range(E):
        edited(tmp_path, f"experts.{e}.down_proj.weight", lambda _, e=e: floats.down[e])
    with pytest.raises(
        ValueError, match=r"gate_up is 'ct int4, packed', .*, their down not quantized; expected the same for both"
    ):
        load_moe_layer(tmp_path, 1)
    two = {
        "group_0": {"targets": ["re:.*down_proj"], "weights": WEIGHTS | {"group_size": 16}},
        "group_1": {"targets": ["Linear"], "weights": WEIGHTS},
    }
    write(tmp_path, made, config_groups=two)
    with pytest.raises(
        ValueError, match=r"gate_up is .*group_size=32.*, their down .*group_size=16.*; expected the same for both"
    ):
        load_moe_layer(tmp_path, 1)


def ct(**changes: Any) -> dict[str, Any]:
    weights = FORMATS["ct w4a16"].words["config_groups"]["group_0"]["weights"]
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights} | changes}}


WEIGHTS = FORMATS["ct w4a16"].words["config_groups"]["group_0"]["weights"]
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "another method": ("deepseek", {"quant_method": "bitsandbytes"},
    "quant_method is 'bitsandbytes'; expected one of 'c"),
    "no method": ("deepseek", {"quant_method": None}, "quant_method is 'None'; expected one of"),
    "act-order": ("gptq", {"desc_act": True}, "desc_act is True; expected False, because experts with permuted inputs"),
    "3 bits": ("gptq", {"bits": 3}, "is .3, 'gptq', True.; expected 4 or 8"),
    "another GPTQ": ("gptq", {"checkpoint_format": "marlin"}, "'marlin'"),
    "AWQ's other order": ("awq", {"version": "gemv"}, "'gemv'"),
    "group_size": ("awq", {"group_size": 0}, "group_size is 0; expected a positive number of inputs, or -1"),
    "an unknown algorithm": ("modelopt fp8", {"quant_algo": "W4A8_AWQ"},
    "quant_algo is 'W4A8_AWQ'; expected one of FP8"),
    "a group of another size": ("modelopt nvfp4", {"group_size": 32},
    "group_size is 32; expected 16, the group size of NVFP4"),
    "static blocks": ("deepseek", {"activation_scheme": "static"},
    "weight_block_size is .32, 16.; expected two numbers, with activation"),
    "an unknown format": ("ct w4a16", {"format": "marlin-24"}, "format is 'marlin-24' for int4; expected one of"),
    "a format for another scheme": ("ct w4a16", {"format": "mxfp8-quantized"},
    "format is 'mxfp8-quantized' for int4; expected"),
    "2 bits": ("ct w4a16", ct(weights=WEIGHTS | {"num_bits": 2}),
    "expected float 8, float 4 in groups of 16 or 32, int 8 or int 4"),
    "compressed act-order": ("ct w4a16", ct(weights=WEIGHTS | {"actorder": "group"}),
    "expected no actorder that permutes inputs"),
    "dynamic weights": ("ct w4a16", ct(weights=WEIGHTS | {"dynamic": True}), "expected weights that are not dynamic"),
    "outputs": ("ct w4a16", ct(output_activations={"num_bits": 8}), "expected weights, and no output_activations"),
    "asymmetric inputs": ("ct w4a16", ct(input_activations={"num_bits": 8, "symmetric": False}),
    "expected inputs without zero points"),
    "static tokens": ("ct w4a16", ct(input_activations={"num_bits": 8, "strategy": "token"}),
    "static=True with granularity='token'"),
    "sparsity": ("ct w4a16", {"sparsity_config": {"format": "sparse-24-bitmask"}},
    "expected neither transforms nor sparsity"),
    "no groups": ("ct w4a16", {"config_groups": [1]}, "config_groups is .1.; expected groups with targets, by name"),
    "a list of numbers": ("deepseek", {"modules_to_not_convert": [1]},
    "a list of modules in quantization_config is .1.; expected names"),
    "a list that is no expression": ("ct w4a16", {"ignore": ["re:("]},
    r"'\(' in a list of modules of .* is no regular expression"),
    "a list that backtracks": ("ct w4a16", {"ignore": ["re:(.+)+!"]},
    "could take very long to match; expected regular"),
    "a list that repeats": ("deepseek", {"modules_to_not_convert": ["re:" + ".*" * 9 + "!"]},
    "could take very long to match"),
    "a list of alternatives": ("ct w4a16", {"ignore": ["re:" + "(a|a)?" * 40]}, "could take very long to match"),
    "a list nested too deep": ("ct w4a16", {"ignore": ["re:" + "(" * 2000 + ")" * 2000]}, "is no regular expression"),
    "a repeat beyond all bounds": ("ct w4a16", {"ignore": ["re:a{99999999999}"]}, "is no regular expression"),
    "targets that backtrack": ("ct w4a16", ct(targets=["re:(.+)+!"]), "could take very long to match"),
    "GPTQModel's patterns": ("gptq", {"dynamic": {"+:(.+)+!": {"bits": 8}}}, "could take very long to match"),
    "experts of another dtype": ("deepseek", {"expert_dtype": "int4"},
    "expert_dtype is 'int4'; expected 'fp8' or 'fp4'"),
    "optimum's other modules": (
        "gptq", {"modules_in_block_to_quantize": [["self_attn.q_proj"]]},
        "gate_proj.qweight is I32, but quantization_config excludes",
    ),
    "nothing but the cache": (
        "modelopt fp8", {"quant_algo": None, "kv_cache_quant_algo": "FP8"},
        "gate_proj.weight is F8_E4M3, but quantization_config excludes",
    ),
    "another size": ("ct w4a16", ct(weights=WEIGHTS | {"group_size": 16}),
    r"weight_scale is \[96, 2\]; expected I X = \[96, 4\]"),
    "blocks of another size": ("deepseek", {"weight_block_size": [16, 16]},
    r"weight_scale_inv is \[3, 4\]; expected I X = \[6, 4\]"),
    "zeros that are not there": (
        "ct w4a16", ct(weights=WEIGHTS | {"symmetric": False}),
        r"weight_zero_point is missing; expected I X = \[12, 2\]",
    ),
    "zeros that should not be there": (
        "ct w4a16 zeros", ct(), r"weight_zero_point is there, I32 \[12, 2\]; expected no tensor of this name",
    ),
    "zeros that are not the middle": ("gptq zeros", {"sym": True},
    "zero points other than 8; expected 8"),
    "zeros of AWQ that are not the middle": ("awq", {"zero_point": False}, "has zero points other than 8"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_words_that_mean_nothing_are_named(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, changes, words = WRONG[case]
    write(tmp_path, FORMATS[name], **changes)
    monkeypatch.setattr(read_plan.torch, "empty", None)  # no allocation is allowed
    with pytest.raises(ValueError, match=words) as caught:
        load_moe_layer(tmp_path, 1)
    assert "expected" in str(caught.value)


def edited(folder: Path, name: str, change: Any) -> None:
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    made = change(tensors.get(f"{PREFIX}.{name}"))
    module = f"{PREFIX}.{name.rpartition('.')[0]}."
    kept = {
        other: t for other, t in tensors.items() if not (f"{PREFIX}.{name}" not in tensors and other.startswith(module))
    }
    save(folder, kept | {f"{PREFIX}.{name}": made})


TENSORS: dict[str, tuple[str, str, Any, str]] = {
    "act-order": ("gptq", "experts.1.up_proj.g_idx", lambda t: t.flip(0),
    "has groups other than 32 consecutive inputs"),
    "another shape": ("ct w4a16", "experts.0.down_proj.weight_shape", lambda t: t - 1,
    r"is \[63, 95\]; expected \[64, 96\]"),
    "gate and up": (
        "ct fp8 tensor", "experts.2.up_proj.input_scale", lambda t: t + 1,
        "is .*; expected .* as in the other half of gate_up",
    ),
    "codes of another dtype": ("ct fp8 channel", "experts.0.up_proj.weight", lambda t: t.view(torch.int8),
    "is I8; expected one of F8"),
    "scales of another dtype": (
        "ct fp8 channel", "experts.0.up_proj.weight_scale", lambda t: t.float(),
        "is F32; expected BF16, as .*gate_proj.weight_scale",
    ),
    "codes cut short": ("awq", "experts.0.up_proj.qweight", lambda t: t[:, :-1].contiguous(),
    r"is \[64, 11\]; expected X I = \[64, 12\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_contradict_are_named(case: str, tmp_path: Path) -> None:
    name, tensor, change, words = TENSORS[case]
    write(tmp_path, FORMATS[name])
    edited(tmp_path, tensor, change)
    with pytest.raises(ValueError, match=words):
        load_moe_layer(tmp_path, 1)


def test_the_larger_input_scale_counts(tmp_path: Path) -> None:
    write(tmp_path, FORMATS["modelopt fp8"])
    edited(tmp_path, "experts.1.up_proj.input_scale", lambda t: t * 2)
    edited(tmp_path, "experts.2.gate_proj.input_scale", lambda t: t * 4)
    _, weights = load_moe_layer(tmp_path, 1)
    assert weights.quant is not None and weights.quant.gate_up_input_scale is not None
    assert weights.quant.gate_up_input_scale.tolist() == [0.25, 0.5, 1.0]


def test_a_config_must_agree_with_the_words(tmp_path: Path) -> None:
    write(tmp_path, FORMATS["ct w4a16"])
    config, weights = load_moe_layer(tmp_path, 1)
    other = dataclasses.replace(FORMATS["ct w4a16"].quant, group_size=16)
    for quant in (None, other):
        with pytest.raises(ValueError, match=r"config.quant is .*; expected QuantConfig.* as in quantization_config"):
            load_moe_weights(tmp_path, PREFIX, dataclasses.replace(config, quant=quant))
    with pytest.raises(ValueError, match=r"gate_up_layout is 'interleaved' with 'ct fp8'; expected 'packed'"):
        write(tmp_path, FORMATS["ct fp8 tensor"])
        load_moe_weights(
            tmp_path, PREFIX, dataclasses.replace(load_moe_layer(tmp_path, 1)[0], gate_up_layout="interleaved")
        )
    with pytest.raises(
        ValueError, match=r"config.quant is not None; expected floats .dequantize_weights.: codes are not written"
    ):
        save_moe_weights(tmp_path / "again", PREFIX, config, weights, layout="deepseek")
    write(tmp_path, FORMATS["modelopt nvfp4"])
    (tmp_path / "config.json").write_text(json.dumps(WORDS | {"quantization_config": FORMATS["modelopt fp8"].words}))
    with pytest.raises(ValueError, match="has quant_algo 'FP8' and 'NVFP4'; expected one"):
        load_moe_layer(tmp_path, 1)
    (tmp_path / "config.json").write_text(json.dumps(WORDS))
    (tmp_path / "hf_quant_config.json").unlink()
    with pytest.raises(ValueError, match=r"but config.json has no quantization_config; expected one"):
        load_moe_layer(tmp_path, 1)


def test_inspect_says_how_experts_are_quantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, FORMATS["deepseek"])
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "  fp8_e4m3 block 32x16  " in out and "quant.activations.scheme=fp8_e4m3" in out
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    (layer,) = json.loads(capsys.readouterr().out)
    assert MoEConfig.from_dict(layer["config"]).quant == FORMATS["deepseek"].quant and layer["dtype"] == "F8_E4M3"


def test_a_dtype_is_for_what_is_no_code(tmp_path: Path) -> None:
    written = write(tmp_path, FORMATS["deepseek"])
    config, weights = load_moe_layer(tmp_path, 1, dtype=torch.bfloat16)
    assert weights.shared is not None and weights.quant is not None and weights.quant.gate_up_scale is not None
    assert torch.equal(weights.shared.gate_up, written.shared_gate_up.bfloat16())
    assert weights.quant.gate_up_scale.dtype == torch.float32 and torch.equal(
        decoded(config, weights).down, written.down
    )


JUNK = (None, "x", [1], [], {}, {"a": 1}, -1, 0, 1e99, True, False, 2.5, 10**30, ["a", "b"], {"a": {"b": "c"}})


def with_junk(words: Any) -> Iterator[Any]:
    """Draws the config with one of its values changed, at any depth."""
    for name, value in words.items():
        yield from ({**words, name: junk} for junk in JUNK)
        if isinstance(value, dict):
            yield from ({**words, name: changed} for changed in with_junk(value))


@pytest.mark.parametrize(
    "name", ["ct w4a16 zeros", "ct nvfp4", "deepseek", "gptq", "awq", "modelopt nvfp4", "modelopt mixed"]
)
def test_no_words_are_a_crash(name: str) -> None:
    for words in with_junk(FORMATS[name].words):
        with contextlib.suppress(ValueError):
            found = method_of({"quant_method": "modelopt", **words}, f"{PREFIX}.experts.0.up_proj", True)
            assert found is None or found.quant.scheme


def test_no_damage_to_a_quantized_file_is_a_crash(tmp_path: Path) -> None:
    """Loading a file with changed bytes in its header gives weights of the same shapes, or a ValueError."""
    write(tmp_path, FORMATS["ct w4a16 zeros"])
    config, weights = load_moe_layer(tmp_path, 1)
    content, random, kinds = (tmp_path / "model.safetensors").read_bytes(), np.random.default_rng(0), set()
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(100):
        damaged = bytearray(content)
        for at in random.integers(0, end, random.integers(1, 4)):
            damaged[at] = random.choice(list(b'"9-{}[],0Z'))
        (tmp_path / "model.safetensors").write_bytes(damaged)
        try:
            loaded = load_moe_weights(tmp_path, PREFIX, config)
        except ValueError as error:
            kinds.add(str(error).removeprefix(str(tmp_path)))
        else:
            assert loaded.gate_up.shape == weights.gate_up.shape
    assert len(kinds) > 3


def test_sizes_that_do_not_fill_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """compressed-tensors pads the last int32 with zeros, along inputs and, for zero points, along outputs."""
    monkeypatch.setattr(quantized_files, "WORDS", WORDS | {"hidden_size": 20, "moe_intermediate_size": 14})
    monkeypatch.setattr(quantized_files, "SIZES", {"gate_proj": (14, 20), "up_proj": (14, 20), "down_proj": (20, 14)})
    for name in ("ct w4a16 channel", "ct fp8 channel", "ct fp8 tensor", "ct int8 zeros", "ct int4"):
        written = write(tmp_path, FORMATS[name])
        config, weights = load_moe_layer(tmp_path, 1)
        floats = decoded(config, weights)
        assert torch.equal(floats.gate_up, written.gate_up) and torch.equal(floats.down, written.down)
        part = load_moe_weights(tmp_path, PREFIX, config, intermediate=slice(6, 14))
        assert torch.equal(decoded(config, part).down, written.down[:, :, 6:])
