"""Quantized checkpoints as published: two methods in one file, keys outside quantization_config, and layers that no
list names.
"""

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import folder
from hypothesis import strategies as st
from quantized_files import (
    FORMATS,
    PREFIX,
    SIZES,
    WIDTH,
    WORDS,
    E,
    Format,
    Matrix,
    X,
    blocks_of_powers,
    group,
    mx,
    nvfp4,
    save,
    save_words,
    write,
)
from support import law
from torch import Tensor

from moe_fn import MoEConfig, MoEWeights, dequantize_weights
from moe_fn.checkpoint import load_moe_layer, load_moe_weights, moe_layers

pytestmark = pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed")

V4 = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "hidden_size": X,
    "moe_intermediate_size": WIDTH,
    "n_routed_experts": E, "n_shared_experts": 1, "num_experts_per_tok": 1, "num_hidden_layers": 4,
    "num_nextn_predict_layers": 1,
    "norm_topk_prob": True, "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc",
    "swiglu_limit": 10.0,
    "num_hash_layers": 3, "torch_dtype": "float32",
}  # fmt: skip
FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [32, 16],
}
LISTED = {f"layers.{layer}.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16} for layer in range(4)}
ANEW = {
    "quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None,
    "producer": {"name": "modelopt"},
}  # fmt: skip
IGNORED = ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"]
MATRICES = {"w1": (WIDTH, X), "w2": (X, WIDTH), "w3": (WIDTH, X)}
FP4 = mx((".weight", ".scale"), 4, e8m0=True, signed=True)
NVFP4 = nvfp4((".weight", ".weight_scale", ".weight_scale_2", ".input_scale"), False)


def fp8(random: np.random.Generator, outputs: int, inputs: int) -> Matrix:
    made = blocks_of_powers(random, outputs, inputs)
    return Matrix({".weight": made.tensors[".weight"], ".scale": made.tensors[".weight_scale_inv"]}, made.floats)


def plain(random: np.random.Generator, outputs: int, inputs: int) -> Matrix:
    floats = random.standard_normal((outputs, inputs)).astype(np.float32)
    return Matrix({".weight": torch.from_numpy(floats).bfloat16()}, torch.from_numpy(floats).bfloat16().float().numpy())


def v4(experts_of_block: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns tensors of DeepSeek-V4's blocks, experts in a format for each block and shared experts in fp8, and the
    floats of each module.
    """
    random, tensors, floats = np.random.default_rng(0), dict[str, Tensor](), dict[str, Tensor]()
    for prefix, lay in experts_of_block.items():
        tensors |= {f"{prefix}.gate.weight": torch.randn(E, X), f"{prefix}.gate.bias": torch.zeros(E)}
        for module, how in [*((f"{prefix}.experts.{e}", lay) for e in range(E)), (f"{prefix}.shared_experts", fp8)]:
            for name, size in MATRICES.items():
                made = how(random, *size)
                tensors |= {f"{module}.{name}{suffix}": t for suffix, t in made.tensors.items()}
                floats[f"{module}.{name}"] = torch.from_numpy(made.floats)
    return tensors, floats


def write_config(folder: Path, config: Mapping[str, Any], quantization: Mapping[str, Any] | None = None) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    if quantization is not None:
        words = {"producer": {"name": "modelopt"}, "quantization": quantization}
        (folder / "hf_quant_config.json").write_text(json.dumps(words))


def check(prefix: str, config: MoEConfig, weights: MoEWeights, floats: Mapping[str, Tensor]) -> None:
    """Checks every element against the floats."""
    plain_weights = weights if config.quant is None else dequantize_weights(config, weights)[1]
    for e in range(E):
        expert = f"{prefix}.experts.{e}"
        assert torch.equal(
            plain_weights.gate_up[e].float(), torch.cat([floats[f"{expert}.w1"], floats[f"{expert}.w3"]])
        )
        assert torch.equal(plain_weights.down[e].float(), floats[f"{expert}.w2"])
    assert weights.shared is not None
    assert torch.equal(weights.shared.down, floats[f"{prefix}.shared_experts.w2"])


WORDS_OF_V4: dict[str, dict[str, Any]] = {
    "outside quantization_config": V4 | {"expert_dtype": "fp4", "quantization_config": FP8},
    "inside (V4.1)": V4 | {"quantization_config": FP8 | {"expert_dtype": "fp4"}},
    "in a nested config": {
        "model_type": "deepseek_v41",
        "text_config": V4 | {"expert_dtype": "fp4"},
        "quantization_config": FP8,
    },
    "nowhere": V4 | {"quantization_config": FP8},  # the dtypes in the file decide
    "null": V4 | {"expert_dtype": None, "quantization_config": FP8 | {"expert_dtype": None}},
}


@pytest.mark.parametrize("case", WORDS_OF_V4)
@pytest.mark.parametrize("lay", [FP4, fp8], ids=["fp4", "fp8"])
def test_deepseek_v4_as_published(case: str, lay: Any, tmp_path: Path) -> None:
    """Experts are in fp4 and everything else in fp8; in the base models experts are in fp8 too."""
    tensors, floats = v4({"layers.3.ffn": lay})
    save(tmp_path, tensors)
    words = json.loads(
        json.dumps(WORDS_OF_V4[case]).replace('"fp4"', '"fp8"') if lay is fp8 else json.dumps(WORDS_OF_V4[case])
    )
    write_config(tmp_path, words)
    config, weights = load_moe_layer(tmp_path, 3)
    assert config.quant is not None and config.quant.scheme == ("mxfp4" if lay is FP4 else "fp8_e4m3")
    check("layers.3.ffn", config, weights, floats)
    assert [layer.problem for layer in moe_layers(tmp_path)] == [None]


NVFP4_OF_V4: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "all in config.json": (FP8 | ANEW | {"ignore": IGNORED, "quantized_layers": LISTED}, None),
    "lists in ModelOpt's file": (FP8 | ANEW, {**ANEW, "exclude_modules": IGNORED, "quantized_layers": LISTED}),
    "fp8 in config.json, ModelOpt in its own file": (
        FP8, {"quant_algo": "MIXED_PRECISION", "exclude_modules": IGNORED, "quantized_layers": LISTED},
    ),
    "one algorithm in ModelOpt's file": (FP8, {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": IGNORED}),
    "no lists": (FP8 | {"moe_quant_algo": "NVFP4"}, None),
    "lower case, and empty lists": (FP8 | ANEW | {"moe_quant_algo": "nvfp4", "ignore": [], "quantized_layers": {}},
    None),
    "another list of layers": (FP8 | ANEW | {"quantized_layers": {"layers.0.ffn.experts": {"quant_algo": "NVFP4"}}},
    None),
}  # fmt: skip


@pytest.mark.parametrize("drafts", ["fp4", "nvfp4", "bf16"])
@pytest.mark.parametrize("case", NVFP4_OF_V4)
def test_nvfp4_releases_say_fp8_and_modelopt_at_once(case: str, drafts: str, tmp_path: Path) -> None:
    """ModelOpt requantized the experts; shared experts remain fp8. Experts of the draft layers are as they were, or
    requantized.
    """
    tensors, floats = v4({"layers.3.ffn": NVFP4, "mtp.0.ffn": {"fp4": FP4, "nvfp4": NVFP4, "bf16": plain}[drafts]})
    save(tmp_path, tensors)
    words, modelopt = NVFP4_OF_V4[case]
    write_config(tmp_path, V4 | {"expert_dtype": "fp4", "quantization_config": words}, modelopt)
    config, weights = load_moe_layer(tmp_path, 3)
    assert config.quant == FORMATS["modelopt nvfp4"].quant
    check("layers.3.ffn", config, weights, floats)
    assert weights.quant is not None and torch.equal(weights.quant.down_input_scale, torch.full((E,), 0.25))  # type: ignore[arg-type]
    if drafts == "nvfp4" and case == "fp8 in config.json, ModelOpt in its own file":
        return  # no key says that they are quantized
    of_drafts = dataclasses.replace(
        config, quant={"fp4": group("mxfp4", 32), "nvfp4": config.quant, "bf16": None}[drafts]
    )
    check("mtp.0.ffn", of_drafts, load_moe_weights(tmp_path, "mtp.0.ffn", of_drafts), floats)


def test_modelopt_alone_may_say_what_experts_are(tmp_path: Path) -> None:
    """The config has the algorithm of the experts and no list of layers: other layers are unchanged."""
    tensors, floats = v4({"layers.3.ffn": NVFP4})
    shared = {f"{module}.weight": t for module, t in floats.items() if "shared" in module}
    save(tmp_path, {name: t for name, t in tensors.items() if "shared" not in name} | shared)
    write_config(tmp_path, V4 | {"quantization_config": ANEW})
    config, weights = load_moe_layer(tmp_path, 3)
    assert config.quant == FORMATS["modelopt nvfp4"].quant
    check("layers.3.ffn", config, weights, floats)


@law(st.sampled_from(sorted(FORMATS)), st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
def test_tensors_stored_as_floats_are_floats_whatever_quantization_config_says(name: str, dtype: torch.dtype) -> None:
    tensors = {f"{PREFIX}.gate.weight": torch.randn(E, X), f"{PREFIX}.gate.e_score_correction_bias": torch.zeros(E)}
    for module in (*(f"experts.{e}" for e in range(E)), "shared_experts"):
        tensors |= {f"{PREFIX}.{module}.{matrix}.weight": torch.randn(size).to(dtype) for matrix, size in SIZES.items()}
    with folder() as path:
        save(path, tensors)
        save_words(path, FORMATS[name])
        config, weights = load_moe_layer(path, 1)
    assert config.quant is None and weights.quant is None and weights.shared is not None
    assert torch.equal(weights.down[1], tensors[f"{PREFIX}.experts.1.down_proj.weight"])
    assert torch.equal(weights.shared.down, tensors[f"{PREFIX}.shared_experts.down_proj.weight"])


DRAFTS = {
    name: FORMATS[name]
    for name in ("ct w4a16", "ct fp8 channel", "deepseek", "gptq", "awq", "modelopt nvfp4", "modelopt mixed")
}


@pytest.mark.parametrize("name", DRAFTS)
def test_draft_layers_in_bf16_need_no_list(name: str, tmp_path: Path) -> None:
    """The layer after the last one of DeepSeek-V3, which published checkpoints leave unquantized without a
    list entry.
    """
    from safetensors.torch import load_file

    made: Format = DRAFTS[name]
    written = write(tmp_path, made)
    draft = PREFIX.replace(".1.", ".2.")
    floats = {f"{draft}.gate.weight": torch.randn(E, X), f"{draft}.gate.e_score_correction_bias": torch.zeros(E)}
    for module in (*(f"experts.{e}" for e in range(E)), "shared_experts"):
        floats |= {f"{draft}.{module}.{matrix}.weight": torch.randn(size).bfloat16() for matrix, size in SIZES.items()}
    save(tmp_path, load_file(tmp_path / "model.safetensors") | floats)
    assert [(layer.index, layer.problem) for layer in moe_layers(tmp_path)] == [(1, None), (2, None)]
    config, weights = load_moe_layer(tmp_path, 1)
    assert config.quant == made.quant and torch.equal(dequantize_weights(config, weights)[1].down, written.down)
    config, weights = load_moe_layer(tmp_path, 2)
    assert config.quant is None and weights.down.dtype == torch.bfloat16 and weights.shared is not None
    assert torch.equal(weights.down[2], floats[f"{draft}.experts.2.down_proj.weight"])
    assert torch.equal(weights.shared.down, floats[f"{draft}.shared_experts.down_proj.weight"])


ONLY_THE_CACHE: dict[str, dict[str, Any]] = {
    "modelopt": {"quant_method": "modelopt", "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "ignore": []},
    "modelopt, null": {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": [],
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
    },
}  # fmt: skip


@pytest.mark.parametrize("case", [*ONLY_THE_CACHE, "modelopt's file"])
def test_a_quantized_cache_leaves_weights_alone(case: str, tmp_path: Path) -> None:
    tensors = {f"{PREFIX}.gate.weight": torch.randn(E, X), f"{PREFIX}.gate.e_score_correction_bias": torch.zeros(E)}
    for module in (*(f"experts.{e}" for e in range(E)), "shared_experts"):
        tensors |= {
            f"{PREFIX}.{module}.{matrix}.weight": torch.randn(size).bfloat16() for matrix, size in SIZES.items()
        }
    tensors |= {"model.layers.1.self_attn.k_proj.k_scale": torch.ones(1)}
    save(tmp_path, tensors)
    if case in ONLY_THE_CACHE:
        write_config(tmp_path, WORDS | {"quantization_config": ONLY_THE_CACHE[case]})
    else:
        write_config(tmp_path, WORDS, {"quant_algo": None, "kv_cache_quant_algo": "FP8"})
    config, weights = load_moe_layer(tmp_path, 1)
    assert config.quant is None and weights.quant is None
    assert torch.equal(weights.down[1], tensors[f"{PREFIX}.experts.1.down_proj.weight"])
    assert [layer.problem for layer in moe_layers(tmp_path)] == [None]
