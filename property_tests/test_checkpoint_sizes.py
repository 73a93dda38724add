"""Checkpoints of real sizes: memory while loading, published models by their headers alone; the inspect command; the
progress bar.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import same_bits

from moe_fn import MoEConfig, ParallelConfig, RankGroup
from moe_fn.checkpoint import (
    LAYOUTS,
    load_moe_layer,
    load_moe_layers,
    load_moe_weights,
    moe_layers,
    read_plan,
    save_moe_weights,
)
from moe_fn.checkpoint.__main__ import main
from moe_fn.families import config_of_layer
from moe_fn.records import leaves_of_weights
from moe_fn.testing import weights_for

pytestmark = pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed")

_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL", torch.float16: "F16",
    torch.int32: "I32",
    torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip


def write_hollow(path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """A file of zeros with a header: it takes no room on the disk, whatever its size."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


E, WIDTH = 32, 1024  # hidden and intermediate: 201 MB in bfloat16, an expert's matrix 2 MB
EACH = {f"b.experts.{e}.{w}.weight": (torch.bfloat16, (WIDTH, WIDTH)) for e in range(E) for w in ("w1", "w2", "w3")}
FUSED = {
    "b.experts.gate_up_proj": (torch.bfloat16, (E, 2 * WIDTH, WIDTH)),
    "b.experts.down_proj": (torch.bfloat16, (E, WIDTH, WIDTH)),
}
LOAD = """
import ctypes, gc, json, sys
from moe_fn import MoEConfig, QuantConfig
from moe_fn.checkpoint import load_moe_weights
ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back to the system
def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
for line in sys.stdin:
    path, layout, weight_layout, slices, quant = json.loads(line)
    config = MoEConfig(num_experts=32, top_k=2, hidden_size=1024, intermediate_size=1024, weight_layout=weight_layout,
                       quant=eval(quant))
    load_moe_weights(path, "b", config, layout=layout, experts=(0,), intermediate=slice(0, 128))  # imports
    gc.collect()
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    weights = load_moe_weights(path, "b", config, layout=layout, **eval(slices))
    print(status("VmHWM") - before, sum(t.nbytes for t in (weights.gate_up, weights.down)), flush=True)
    del weights
"""


@pytest.fixture(scope="module")
def loader() -> Iterator[Callable[..., tuple[int, int]]]:
    """(path, layout, weight layout, slices, quant) -> the peak of loading a layer, and its bytes, in one process."""
    arguments = [sys.executable, "-c", LOAD]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        sent, answers = process.stdin, process.stdout

        def load(*case: str) -> tuple[int, int]:
            sent.write(json.dumps(case) + "\n")
            sent.flush()
            peak, layer = answers.readline().split()
            return int(peak), int(layer)

        yield load
        sent.close()


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of a process' memory here")
@pytest.mark.parametrize(
    ("layout", "slices", "weight_layout"),
    [
        ("mixtral", "{}", "out_in"),
        ("mixtral", "{'experts': range(8)}", "out_in"),
        ("qwen fused", "{}", "out_in"),
        ("qwen fused", "{'intermediate': slice(256, 512)}", "out_in"),
        ("qwen fused", "{}", "in_out"),
    ],
)
def test_a_layer_is_held_once(
    layout: str, slices: str, weight_layout: str, tmp_path: Path, loader: Callable[..., tuple[int, int]]
) -> None:
    write_hollow(
        tmp_path / "model.safetensors",
        {**(EACH if layout == "mixtral" else FUSED), "b.gate.weight": (torch.bfloat16, (E, WIDTH))},
    )
    peak, layer = loader(str(tmp_path), layout, weight_layout, slices, "None")
    assert layer == 201_326_592 / (1 if slices == "{}" else 4)
    assert 0.9 * layer <= peak <= layer + 40e6, f"{peak / 1e6:.0f} MB for a layer of {layer / 1e6:.0f} MB"


@pytest.mark.parametrize("layout", ["mixtral", "qwen fused", "gpt_oss"])
def test_a_rank_reads_no_more_than_its_part(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MoEConfig(num_experts=4, top_k=1, hidden_size=8, intermediate_size=8)
    parallel = ParallelConfig(ep=RankGroup(name="0", size=2, rank=1), tp=RankGroup(name="1", size=2, rank=1))
    weights = weights_for(config, bias=layout == "gpt_oss", scales=False)
    save_moe_weights(tmp_path, "layers.3.mlp", config, weights, layout=layout)
    read = []
    copy = read_plan._copy_piece
    monkeypatch.setattr(
        read_plan, "_copy_piece", lambda piece, source, *rest: (read.append(source.nbytes), copy(piece, source, *rest))
    )
    mine = load_moe_weights(tmp_path, "layers.3.mlp", dataclasses.replace(config, parallel=parallel), layout=layout)
    assert sum(read) == sum(t.nbytes for t in leaves_of_weights(mine) if t is not None)


FP8 = {".weight": (torch.float8_e4m3fn, (1024, 1024)), ".weight_scale_inv": (torch.float32, (8, 8))}
GPTQ = {
    ".qweight": (torch.int32, (128, 1024)), ".qzeros": (torch.int32, (8, 128)), ".scales": (torch.float16, (8, 1024)),
}  # fmt: skip
SMALL = {
    "fp8": (
        FP8, {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "scheme='fp8_e4m3', granularity='block', block_shape=(128, 128)", 1,
    ),
    "gptq": (
        GPTQ, {"quant_method": "gptq", "bits": 4, "sym": False, "group_size": 128},
        "scheme='int4', granularity='group', group_size=128, zero_points=True", 2,
    ),
}  # fmt: skip


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of a process' memory here")
@pytest.mark.parametrize(("method", "slices"), [("fp8", "{}"), ("fp8", "{'experts': range(8)}"), ("gptq", "{}")])
def test_a_quantized_layer_is_held_once(
    method: str, slices: str, tmp_path: Path, loader: Callable[..., tuple[int, int]]
) -> None:
    stored, words, quant, per_byte = SMALL[method]
    tensors = {
        f"b.experts.{e}.{w}{name}": kind for e in range(E) for w in ("w1", "w2", "w3") for name, kind in stored.items()
    }
    write_hollow(tmp_path / "model.safetensors", {**tensors, "b.gate.weight": (torch.bfloat16, (E, WIDTH))})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", "quantization_config": words}))
    peak, layer = loader(str(tmp_path), "mixtral", "out_in", slices, f"QuantConfig({quant})")
    assert layer == 100_663_296 / per_byte / (1 if slices == "{}" else 4)
    assert 0.9 * layer <= peak <= layer + 40e6, f"{peak / 1e6:.0f} MB for a layer of {layer / 1e6:.0f} MB"


# Default configs of transformers, a few layers of them: wrappers around the language model, and names of every kind
PUBLISHED = {
    "aria": "language_model.model.layers.0.mlp", "glm4v_moe": "model.language_model.layers.1.mlp",
    "glm5_next": "model.language_model.layers.3.mlp", "inkling2": "model.llm.layers.0.mlp",
    "minimax_m3_vl": "language_model.model.layers.0.block_sparse_moe", "mistral_large4": "layers.1",
    "muse_spark": "model.language_model.layers.0.mlp", "qwen3_vl_moe": "model.language_model.layers.0.mlp",
    "step3p7": "model.layers.3.moe",
    "deepseek_v4": "model.layers.0.ffn", "nemotron_h": "backbone.layers.1.mixer",
    "switch_transformers": "decoder.block.1.layer.2.mlp",
    "longcat_flash": "model.layers.0.mlp", "deepseek_v3": "model.layers.3.mlp", "openai_privacy_filter": "layers.0.mlp",
}  # fmt: skip


def shortened(config: Any, most: int = 5) -> Any:
    """The config with a few layers, towers too."""
    for name, value in list(vars(config).items()):
        if name in ("num_hidden_layers", "num_layers", "depth") and isinstance(value, int):
            setattr(config, name, min(value, most))
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type") and isinstance(value, list | tuple):
            setattr(config, name, list(value)[:most])
        elif hasattr(value, "to_dict"):
            shortened(value, most)
    return config


@pytest.mark.parametrize("family", PUBLISHED)
def test_models_of_published_sizes_fit(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.models.auto import modeling_auto

    tables = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MULTIMODAL_LM")
    tables = [getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}) for name in tables] + [
        modeling_auto.MODEL_MAPPING_NAMES
    ]
    name = next(table[family] for table in tables if family in table)
    config = shortened(transformers.CONFIG_MAPPING[family]())
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    tensors = revert_weight_conversion(model, model.state_dict())
    write_hollow(tmp_path / "model.safetensors", {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    layers = moe_layers(tmp_path)
    assert layers[0].prefix == PUBLISHED[family]
    assert not [layer.problem for layer in layers if layer.problem]
    assert all(layer.bytes > 1e7 for layer in layers)


WORDS = {
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 4,
    "intermediate_size": 6,
}


def small_model(path: Path) -> None:
    """Three layers of Mixtral, of which the last lacks its gate."""
    config = MoEConfig(num_experts=8, top_k=2, hidden_size=4, intermediate_size=6)
    whole = next(layout for layout in LAYOUTS if layout.name == "mixtral")
    without_gate = dataclasses.replace(
        whole, entries=tuple(entry for entry in whole.entries if entry.weight != ("router", "gate"))
    )
    for layer, layout in enumerate((whole, whole, without_gate)):
        weights = weights_for(config, layer, dtype=torch.bfloat16, bias=False, scales=False)
        weights = weights if layout is whole else dataclasses.replace(weights, router=None)
        save_moe_weights(
            path, f"model.layers.{layer}.block_sparse_moe", config, weights, layout=layout, max_shard_bytes=900
        )
    (path / "config.json").write_text(json.dumps(WORDS))


def test_inspect_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_model(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 1
    out = capsys.readouterr().out.replace(str(tmp_path), "PATH")
    assert out.splitlines()[:3] == [
        "layers  family   layout   experts  top-k  hidden  intermediate  shared  dtype  bytes each",
        "0-1     mixtral  mixtral  8        2      4       6             -       BF16   1.28 kB",
        "2       mixtral  ?        8        2      4       6             -       BF16   1.15 kB",
    ]
    assert "  options  router.gate_dtype=input" in out
    assert "PATH: model.layers.2.block_sparse_moe does not fit the layout 'mixtral' and the config:" in out
    assert "model.layers.2.block_sparse_moe.gate.weight is missing; expected C W = [8, 4]" in out


def test_inspect_says_which_experts_are_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {
        "model_type": "hunyuan_v1_moe", "num_experts": 2, "moe_topk": 1, "hidden_size": 4, "intermediate_size": 6,
        "num_shared_expert": 1,
    }  # fmt: skip
    config = config_of_layer(words, 0)
    weights = weights_for(config, dtype=torch.bfloat16, bias=False, scales=False)
    save_moe_weights(tmp_path, "model.layers.0.mlp", config, weights, layout="hunyuan")
    (tmp_path / "config.json").write_text(json.dumps(words))
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert (
        "2        1      4       6             1 x 6   BF16" in out and "  options  shared.intermediate_size=6\n" in out
    )


def test_inspect_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_model(tmp_path)
    assert main(["inspect", str(tmp_path), "--json"]) == 1
    first, _, last = json.loads(capsys.readouterr().out)
    assert MoEConfig.from_dict(first.pop("config")) == load_moe_layer(tmp_path, 0)[0]
    assert first == {
        "index": 0, "prefix": "model.layers.0.block_sparse_moe", "family": "mixtral", "layout": "mixtral",
        "dtype": "BF16",
        "bytes": 8 * 3 * 24 * 2 + 8 * 4 * 4, "problem": None, "options": {"router.gate_dtype": "input"},
    }  # fmt: skip
    assert last["layout"] is None and "gate.weight is missing" in last["problem"]
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "does not exist; expected a checkpoint folder" in capsys.readouterr().err


def test_layers_come_one_by_one_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_model(tmp_path)
    prefixes = []
    for prefix, config, weights in load_moe_layers(tmp_path, (1, "model.layers.0.block_sparse_moe")):
        layer = int(prefix.split(".")[2])
        assert same_bits(weights, weights_for(config, layer, dtype=torch.bfloat16, bias=False, scales=False))
        prefixes.append(layer)
    assert prefixes == [1, 0]
    err = capsys.readouterr().err
    assert (
        err
        == f"1/2 {tmp_path.name}: model.layers.1.block_sparse_moe\n2/2 {tmp_path.name}: model.layers.0.block_sparse_moe\n"  # noqa: E501
    )
    assert len(list(load_moe_layers(tmp_path, [0], progress=False))) == 1 and not capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no experts in layer 7; expected one of 0, 1, 2"):
        next(load_moe_layers(tmp_path, [0, 7]))
    with pytest.raises(ValueError, match=r"gate.weight is missing"):
        list(load_moe_layers(tmp_path, progress=False))


def test_the_command_runs(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "moe_fn.checkpoint", "inspect", str(tmp_path)], capture_output=True, text=True
    )
    assert (
        found.returncode == 2
        and "expected model.safetensors, or shards with model.safetensors.index.json" in found.stderr
    )
