"""Invalid checkpoints raise an error that names the tensor or key and what was expected, before any allocation."""

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import folder, read_raw, same_bits, write_raw
from hypothesis import given
from hypothesis import strategies as st

from moe_fn import (
    LoRAConfig,
    MoEConfig,
    MoEWeights,
    ParallelConfig,
    RankGroup,
    RouterConfig,
    SharedExpertsConfig,
    shard_weights,
)
from moe_fn.checkpoint import load_moe_layer, load_moe_layers, load_moe_weights, moe_layers, read_plan, save_moe_weights
from moe_fn.checkpoint.__main__ import main
from moe_fn.testing import weights_for

pytestmark = pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed")

PREFIX = "model.layers.3.mlp"
CONFIG = MoEConfig(
    num_experts=3, top_k=1, hidden_size=4, intermediate_size=2,
    router=RouterConfig(scoring="sigmoid", correction_bias="scores"),
    shared=SharedExpertsConfig(intermediate_size=2),
)  # fmt: skip
WEIGHTS = weights_for(CONFIG, bias=False, scales=False)
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


def save(path: Path, shard_bytes: int = 10**9) -> None:
    save_moe_weights(path, PREFIX, CONFIG, WEIGHTS, layout="deepseek", max_shard_bytes=shard_bytes)


def load(path: Path) -> MoEWeights:
    return load_moe_weights(path, PREFIX, CONFIG, layout="deepseek")


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Changes the header of the only file, and keeps its data."""

    def edit(path: Path) -> None:
        header, data = read_raw(path / ONE)
        change(header)
        write_raw(path / ONE, header, data)

    return edit


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return edited(lambda header: header.update({f"{PREFIX}.{new}": header.pop(f"{PREFIX}.{old}")}))


def with_entry(name: str, **changes: Any) -> Callable[[Path], None]:
    return edited(lambda header: header[f"{PREFIX}.{name}"].update(changes))


def cut_short(path: Path) -> None:
    (path / ONE).write_bytes((path / ONE).read_bytes()[:-5])


def added(name: str, dtype: str, shape: list[int], size: int) -> Callable[[Path], None]:
    def add(path: Path) -> None:
        header, data = read_raw(path / ONE)
        header[f"{PREFIX}.{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        write_raw(path / ONE, header, data + bytes(size))

    return add


def repeated(path: Path) -> None:
    """Writes the name of the first tensor twice, which a dict cannot represent."""
    header, data = read_raw(path / ONE)
    text = json.dumps(header)
    first = next(name for name in header if name != "__metadata__")
    write_raw(path / ONE, (text[:-1] + f', "{first}": {json.dumps(header[first])}}}').encode(), data)


def in_words(path: Path, text: bytes, length: int | None = None) -> None:
    write_raw(path / ONE, text, read_raw(path / ONE)[1], length)


DOWN = "experts.1.down_proj.weight"  # F32 [4, 2]: 32 bytes
FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (renamed(DOWN, "elsewhere"), rf"{DOWN} is missing; expected X I = \[4, 2\]"),
    "surplus": (
        renamed("gate.weight", "gate.weights"),
        r"gate.weights is there, F32 \[3, 4\]; expected no tensor of this name below",
    ),
    "one expert too many": (
        added("experts.3.down_proj.weight", "F32", [4, 2], 32),
        r"experts.3.down_proj.weight is there",
    ),
    "of no use": (
        added("shared_experts.gate_proj.bias", "F32", [2], 8),
        r"shared_experts.up_proj.bias is missing; expected it with",
    ),
    "mis-shaped": (with_entry(DOWN, shape=[2, 4]), rf"{DOWN} is \[2, 4\]; expected X I = \[4, 2\]"),
    "flat": (with_entry(DOWN, shape=[8]), rf"{DOWN} is \[8\]; expected X I"),
    "another dtype": (
        with_entry(DOWN, dtype="BF16", shape=[4, 4]),
        rf"{DOWN} is BF16; expected F32, as model.layers.3.mlp.experts.0",
    ),
    "no float": (with_entry(DOWN, dtype="I32"), rf"{DOWN} is I32; expected one of F64, F32, BF16, F16"),
    "mxfp4": (
        added("experts.down_proj_blocks", "U8", [4], 4),
        r"has tensors of a quantized model \(.*experts.down_proj_blocks\), but .* no quantization_config; expected one",
    ),
    "fp8": (
        added(f"{DOWN}_scale_inv", "F32", [1], 4),
        rf"has tensors of a quantized model \(.*{DOWN}_scale_inv\), but config.json has no quantization_config",
    ),
    "float8": (
        with_entry(DOWN, dtype="F8_E4M3", shape=[4, 8]),
        rf"has tensors of a quantized model \(.*{DOWN}\), but config.json has no quantization_config",
    ),
    "cut short": (cut_short, r"model.safetensors is cut short: .* ends at byte"),
    "longer than it says": (
        lambda path: (path / ONE).write_bytes((path / ONE).read_bytes() + b"xyz"),
        "has 3 bytes after its last tensor",
    ),
    "empty": (lambda path: (path / ONE).write_bytes(b""), "has no header, but the file has 0 bytes"),
    "no header": (lambda path: (path / ONE).write_bytes(b"\0" * 5), "has no header, but the file has 5 bytes"),
    "length beyond the file": (lambda path: in_words(path, b"{}", 10**6), "says that its header has 1000000 bytes"),
    "largest length": (lambda path: in_words(path, b"{}", 2**64 - 1), f"says that its header has {2**64 - 1} bytes"),
    "no json": (lambda path: in_words(path, b"{'a': 1}"), "is no JSON"),
    "no text": (lambda path: in_words(path, b'{"\xff\xfe": 1}'), "is no JSON .UnicodeDecodeError"),
    "deep json": (
        lambda path: in_words(path, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "is no JSON .RecursionError",
    ),
    "deep json that can be read": (
        lambda path: in_words(path, b'{"a":' + b"[" * 300 + b"]" * 300 + b"}"),
        "nests lists and objects deeper than 64",
    ),
    "half of a surrogate": (renamed("gate.weight", "\ud800"), "gate.weight is missing"),
    "a list": (lambda path: in_words(path, b"[1]"), "holds a list; expected a JSON object"),
    "a name twice": (repeated, " twice; expected every name once"),
    "metadata": (edited(lambda header: header.update(__metadata__=[1])), "__metadata__ is"),
    "an entry of nothing": (
        edited(lambda header: header.update({f"{PREFIX}.{DOWN}": 5})),
        f"{DOWN} is .*expected dtype, shape",
    ),
    "a negative size": (with_entry(DOWN, shape=[-4, -2]), f"{DOWN} is .*expected dtype, shape"),
    "a size of half": (with_entry(DOWN, shape=[4.0, 2]), f"{DOWN} is .*expected dtype, shape"),
    "a size of true": (with_entry(DOWN, shape=[True, 8]), f"{DOWN} is .*expected dtype, shape"),
    "huge": (with_entry(DOWN, shape=[2**62, 2**62]), f"{DOWN} has 32 bytes; expected"),
    "beyond any address": (with_entry(DOWN, shape=[10**4000]), f"{DOWN} is .*expected dtype, shape"),
    "a number too long to read": (lambda path: in_words(path, b'{"a": 1' + b"0" * 5000 + b"}"), "is no JSON"),
    "many dims": (with_entry(DOWN, shape=[2**40] * 1000), f"{DOWN} is .*expected dtype, shape"),
    "an unknown dtype": (with_entry(DOWN, dtype="F128"), f"{DOWN} has dtype 'F128'; expected one of F64"),
    "a dtype of another size": (
        with_entry(DOWN, dtype="F64"),
        rf"{DOWN} has 32 bytes; expected 64 for F64 \[4, 2\]",
    ),
    "overlapping": (
        with_entry("gate.weight", data_offsets=[0, 48]),
        "and overlaps the tensor before it; expected byte",
    ),
    "backwards": (with_entry(DOWN, data_offsets=[32, 0]), f"{DOWN} has -32 bytes; expected 32"),
    "past the end": (with_entry(DOWN, data_offsets=[10**9, 10**9 + 32]), "is cut short"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_wrong_is_named(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, words = FILES[case]
    save(tmp_path)
    assert same_bits(load(tmp_path), WEIGHTS)
    spoil(tmp_path)
    monkeypatch.setattr(read_plan.torch, "empty", None)  # no allocation is allowed
    with pytest.raises(ValueError, match=words) as caught:
        load(tmp_path)
    assert "expected" in str(caught.value) and "\n    " not in str(caught.value)


def of_index(change: Callable[[dict[str, str]], None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        index = json.loads((path / INDEX).read_text())
        change(index["weight_map"])
        (path / INDEX).write_text(json.dumps(index))

    return edit


def moved(file: str) -> Callable[[Path], None]:
    return of_index(lambda files: files.update({f"{PREFIX}.{DOWN}": file}))


def copied(path: Path) -> None:
    """Copies a shard to a second name, and lists its first tensor there."""
    first = json.loads((path / INDEX).read_text())["weight_map"]
    (path / "copy.safetensors").write_bytes((path / first[f"{PREFIX}.{DOWN}"]).read_bytes())
    of_index(lambda files: files.update({f"{PREFIX}.{DOWN}": "copy.safetensors"}))(path)


def instead_of_shard(path: Path) -> Path:
    (path / "model-00002.safetensors").unlink()
    return path / "model-00002.safetensors"


INDICES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no shard": (lambda path: (path / "model-00002.safetensors").unlink(), "model-00002.safetensors: No such file"),
    "a folder for a shard": (lambda path: instead_of_shard(path).mkdir(), "no regular file"),
    "a pipe for a shard": (lambda path: os.mkfifo(instead_of_shard(path)), "no regular file"),
    "the wrong shard": (moved("model-00001.safetensors"),
    f"lists {PREFIX}.{DOWN} in model-00001.safetensors, but the file does not have it"),
    "a shard that was never there": (moved("nowhere.safetensors"), "nowhere.safetensors: No such file"),
    "outside": (moved("../model-00001.safetensors"),
    "'../model-00001.safetensors'; expected the name of a file in the same folder"),
    "absolute": (moved("/etc/passwd"), "'/etc/passwd'; expected the name of a file in the same folder"),
    "a folder": (moved(".."), "'..'; expected the name of a file"),
    "a pickle": (moved("model.bin"), "'model.bin'; expected a .safetensors file .pickles are not read"),
    "a number": (of_index(lambda files: files.update(a=5)), "a is in 5; expected the name"),  # type: ignore[call-arg]
    "unlisted": (of_index(lambda files: files.pop(f"{PREFIX}.experts.0.down_proj.weight")),
    "but the index does not list it"),
    "listed elsewhere": (copied, "but the index lists it in"),
    "no json": (lambda path: (path / INDEX).write_text("{"), "index.json is no JSON"),
    "no weight map": (lambda path: (path / INDEX).write_text("{}"),
    "weight_map is None; expected an object from tensor names"),
    "two names": (lambda path: (path / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'), "has 'a' twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_is_wrong_is_named(case: str, tmp_path: Path) -> None:
    spoil, words = INDICES[case]
    save(tmp_path, shard_bytes=100)
    assert same_bits(load(tmp_path), WEIGHTS) and len(list(tmp_path.glob("model-*.safetensors"))) > 3
    spoil(tmp_path)
    with pytest.raises(ValueError, match=words):
        load(tmp_path)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "more experts": ({"num_experts": 4}, r"experts.3.gate_proj.weight is missing; expected I X = \[2, 4\]"),
    "fewer experts": ({"num_experts": 2}, "experts.2.gate_proj.weight is there"),
    "another width": ({"intermediate_size": 3}, r"experts.0.gate_proj.weight is \[2, 4\]; expected I X = \[3, 4\]"),
    "no bias": ({"router": RouterConfig(scoring="sigmoid")},
    "correction_bias is there; expected none, because the config does not use it"),
    "no shared experts": ({"shared": None}, "shared_experts.gate_proj.weight is there; expected none"),
    "not gated": ({"activation": "relu2_no_mul"},
    "weights.gate_up has gates and ups in the layout 'deepseek'; expected"),
    "sigmoid gate": (
        {"shared": SharedExpertsConfig(intermediate_size=2, gate="sigmoid")},
        "no tensor of the layout 'deepseek' is weights.shared.gate; expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_does_not_fit_is_named(case: str, tmp_path: Path) -> None:
    changes, words = CONFIGS[case]
    save(tmp_path)
    with pytest.raises(ValueError, match=words):
        load_moe_weights(
            tmp_path,
            PREFIX,
            MoEConfig(**{**CONFIG.to_dict(), "router": CONFIG.router, "shared": CONFIG.shared, **changes}),
        )


def test_arguments_that_mean_nothing_are_named(tmp_path: Path) -> None:
    save(tmp_path)
    for changes, words in (
        ({"experts": (0, 3)}, r"experts is \(0, 3\); expected ids in 0..2"),
        ({"experts": ()}, "at least one"),
        (
            {"intermediate": slice(0, 3)},
            "intermediate is slice.0, 3, None.; expected a nonempty slice of 0..2, without a step",
        ),
        ({"intermediate": slice(1, 1)}, "intermediate is"),
        ({"intermediate": slice(0, 2, 2)}, "intermediate is"),
        ({"shared_intermediate": slice(-1, 2)}, "shared_intermediate is"),
        ({"layout": "deep"}, "layout is 'deep'; expected one of 'mixtral'"),
    ):
        with pytest.raises(ValueError, match=words):
            load_moe_weights(tmp_path, PREFIX, CONFIG, **changes)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"model.layers.4.mlp is not the prefix of any tensor.s name; expected the prefix"
    ):
        load_moe_weights(tmp_path, "model.layers.4.mlp", CONFIG)
    with pytest.raises(ValueError, match=r"no experts in layer 4; expected one of 3"):
        load_moe_layer(tmp_path, 4)
    with pytest.raises(ValueError, match=r"has no config.json; expected one, or load_moe_weights"):
        load_moe_layer(tmp_path, 3)


def test_what_safetensors_alone_refuses_is_named(tmp_path: Path) -> None:
    """A lone surrogate in a key that is not read: Python's JSON accepts it, safetensors' JSON does not."""
    save(tmp_path)
    header, data = read_raw(tmp_path / ONE)
    write_raw(tmp_path / ONE, {**header, "__metadata__": {"a": "\ud800"}}, data)
    with pytest.raises(ValueError, match=r"invalid JSON in header.*expected a file that safetensors reads"):
        load(tmp_path)


@pytest.mark.parametrize("count", [10**6, 2**31, 2**62])
def test_experts_that_no_file_has_take_no_time(count: int, tmp_path: Path) -> None:
    """A config.json may have any number of experts: the error names the first missing tensors, and no list of all is
    made.
    """
    save(tmp_path)
    words = {
        "model_type": "deepseek_v3",
        "n_routed_experts": count,
        "num_experts_per_tok": 2,
        "hidden_size": 4,
        "moe_intermediate_size": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps({**words, "n_shared_experts": 1}))
    (layer,) = moe_layers(tmp_path)
    assert layer.problem is not None and "experts.3.gate_proj.weight is missing" in layer.problem
    with pytest.raises(ValueError, match=r"experts.3.gate_proj.weight is missing"):
        load_moe_layer(tmp_path, 3)


MIXTRAL = {
    "model_type": "mixtral",
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "hidden_size": 4,
    "intermediate_size": 2,
}
NAMES: dict[str, tuple[Any, list[str], str]] = {
    "an expert's parts": (
        MIXTRAL, ["model.layers.0.block_sparse_moe.experts.0.linear_v.weight"],
        r"by its tensors.*'mixtral': it has .*linear_v.weight; expected names like "
        r"layers.N.block_sparse_moe.experts.\{e\}.w2.weight",
    ),
    "no experts by name": (MIXTRAL, ["model.layers.0.some_ffn.0"],
    r"by its config.json.* it has model.layers.0.some_ffn.0; expected"),
    "behind a dense layer": (
        MIXTRAL, ["model.layers.0.mlp.down_proj.weight", "model.layers.1.some_ffn.0"],
        r"by its config.json.* it has model.layers.1.some_ffn.0; expected",
    ),
    "in a layer with a dense MLP": (
        {"model_type": "gemma4", "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 2},
        ["model.layers.0.mlp.down_proj.weight"],
        r"by its config.json.* it has model.layers.0.mlp.down_proj.weight; expected",
    ),
    "no family": ({"model_type": "unheard_of"}, ["model.layers.0.mlp.experts.down"], r"by its tensors.*'unheard_of'"),
    "no config": (None, ["transformer.blocks.0.experts.1.a"], r"by its tensors.*'\?'"),
}  # fmt: skip
WITHOUT: dict[str, tuple[Any, list[str]]] = {
    "one expert": (MIXTRAL | {"num_local_experts": 1}, ["model.layers.0.mlp.down_proj.weight"]),
    "dense, of a family that may have experts": (
        {"model_type": "gemma4", "hidden_size": 4},
        ["model.layers.0.mlp.down_proj.weight"],
    ),
    "dense layers alone": (
        {"model_type": "qwen3_moe", "mlp_only_layers": [0]},
        ["model.layers.0.mlp.down_proj.weight"],
    ),
    "dense, where a class has experts": (
        {"model_type": "nemotron_h", "hybrid_override_pattern": "-M*"},
        [f"backbone.layers.{index}.mixer.{name}_proj.weight" for index, name in enumerate(("down", "out", "o"))],
    ),
    "unheard of": (
        {"model_type": "unheard_of"},
        ["model.layers.0.mlp.down_proj.weight", "action_expert.layers.0.mlp.down_proj.weight"],
    ),
    "no layer at all": (MIXTRAL, ["lm_head.weight"]),
}


def write_names(path: Path, words: Any, names: list[str]) -> None:
    ends = [{"dtype": "F32", "shape": [1], "data_offsets": [4 * place, 4 * place + 4]} for place in range(len(names))]
    write_raw(path / ONE, dict(zip(names, ends, strict=True)), bytes(4 * len(names)))
    if words is not None:
        (path / "config.json").write_text(json.dumps(words))


@pytest.mark.parametrize("case", NAMES)
def test_experts_under_names_that_are_not_known_are_said_to_be_there(case: str, tmp_path: Path) -> None:
    words, names, said = NAMES[case]
    write_names(tmp_path, words, names)
    for find in (
        moe_layers,
        lambda path: list(load_moe_layers(path, progress=False)),
        lambda path: load_moe_layer(path, 0),
    ):
        with pytest.raises(ValueError, match=said):
            find(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 2


@pytest.mark.parametrize("case", WITHOUT)
def test_a_model_without_experts_has_no_layers(case: str, tmp_path: Path) -> None:
    write_names(tmp_path, *WITHOUT[case])
    assert moe_layers(tmp_path) == []


def test_a_shard_without_experts_has_no_layers(tmp_path: Path) -> None:
    write_names(tmp_path, MIXTRAL, ["model.layers.0.self_attn.q_proj.weight"])
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"model.layers.0.self_attn.q_proj.weight": ONE}}))
    assert moe_layers(tmp_path / ONE) == []
    with pytest.raises(ValueError, match=r"by its config\.json"):
        moe_layers(tmp_path)


def test_what_is_no_config_is_named(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(ValueError, match=r"^load_moe_weights: config is a dict; expected MoEConfig"):
        load_moe_weights(tmp_path, PREFIX, {}, layout="deepseek")  # type: ignore[arg-type]


def test_folders_without_a_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; expected a checkpoint folder"):
        load(tmp_path / "nowhere")
    for name in ("model.bin", "model.pt", "model.pth", "model.ckpt", "model.gguf"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=rf"\({name}: pickles are not read\); expected model\.safetensors"):
            load(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json holds a list; expected a JSON object"):
        moe_layers(tmp_path)


@given(st.data())
def test_no_damage_to_a_file_is_a_crash(data: st.DataObject) -> None:
    """Loading after changes, removals and insertions of bytes in the header gives weights of the same shapes, or a
    ValueError.
    """
    with folder() as path:
        save(path)
        content = bytearray((path / ONE).read_bytes())
        end = 8 + int.from_bytes(content[:8], "little")
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, end - 1))
            new = data.draw(
                st.binary(max_size=3) | st.sampled_from([b'"', b"9", b"-", b"{", b"}", b"[", b"]", b",", b"0", b"e9"])
            )
            content[at : at + data.draw(st.integers(0, 2))] = new
        (path / ONE).write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
        try:
            loaded = load(path)
        except ValueError as error:
            assert str(error)
        else:
            assert loaded.gate_up.shape == WEIGHTS.gate_up.shape and torch.is_tensor(loaded.down)


def test_what_is_saved_is_whole_whoever_saves_it(tmp_path: Path) -> None:
    """Any rank may save the whole weights, biases included; a slice of them is an error."""
    config = MoEConfig(num_experts=2, top_k=1, hidden_size=4, intermediate_size=4, activation="relu2_no_mul")
    whole = weights_for(config, bias=True, scales=False)
    sliced = dataclasses.replace(config, parallel=ParallelConfig(tp=RankGroup(name="0", size=2, rank=1)))
    with pytest.raises(ValueError, match=r"weights.gate_up is \[2, 2, 4\]; expected \[2, 4, 4\]"):
        save_moe_weights(tmp_path, "layers.3.ffn", sliced, shard_weights(sliced, whole), layout="nllb")
    save_moe_weights(tmp_path, "layers.3.ffn", sliced, whole, layout="nllb")
    assert same_bits(load_moe_weights(tmp_path, "layers.3.ffn", config, layout="nllb"), whole)


def test_saving_what_does_not_fit_is_named(tmp_path: Path) -> None:
    bias = weights_for(CONFIG, bias=True, scales=False)
    for weights, layout, words in (
        (
            bias,
            "deepseek",
            r"weights.gate_up_bias is \[3, 4\]; expected None, because the layout 'deepseek' does not have it",
        ),
        (
            WEIGHTS,
            "mistral_large4",
            "weights.router.correction_bias is .* because the layout 'mistral_large4' does not have it",
        ),
        (WEIGHTS, "bailing", None),
        (WEIGHTS, "gemma4", "has tensors that hold more than a block"),
        (weights_for(CONFIG, bias=False, scales=True), "deepseek", "weights.router.expert_scale"),
    ):
        if words is not None:
            with pytest.raises(ValueError, match=words):
                save_moe_weights(tmp_path, PREFIX, CONFIG, weights, layout=layout)
    assert not list(tmp_path.iterdir())
    adapted = dataclasses.replace(CONFIG, lora=LoRAConfig())
    with pytest.raises(
        ValueError, match=r"weights.lora.gate_up_a is .* because the layout 'deepseek' does not have it"
    ):
        save_moe_weights(tmp_path, PREFIX, adapted, weights_for(adapted, bias=False, scales=False), layout="deepseek")
    other = MoEConfig(**{**CONFIG.to_dict(), "router": CONFIG.router, "shared": CONFIG.shared, "hidden_size": 5})
    with pytest.raises(ValueError, match=r"weights.gate_up is \[3, 4, 4\]; expected \[3, 4, 5\]"):
        save_moe_weights(tmp_path, PREFIX, other, WEIGHTS, layout="deepseek")
