"""Rows of small tables of keys, dtypes and names; each test covers a whole table."""

import importlib
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe_fn
from moe_fn import ActivationConfig, MoEConfig
from moe_fn.families import FAMILIES, config_of_layer
from moe_fn.families.config_class import _FLOATS
from moe_fn.families.find import PARTS
from moe_fn.reference.activation import gate_function
from moe_fn.testing import assert_matches, weights_for

if importlib.util.find_spec("safetensors") is None:
    pytest.skip("safetensors is not installed", allow_module_level=True)

import safetensors
from quantized_files import FORMATS, E, Format, X, save, write
from safetensors.torch import load_file, save_file

from moe_fn.checkpoint import LAYOUTS, load_lora, load_moe_layer, load_moe_weights, save_moe_weights
from moe_fn.checkpoint.adapter_modules import _PARTS
from moe_fn.checkpoint.folder import _DTYPES, dtype_of_floats
from moe_fn.checkpoint.quantized.methods import _READERS
from moe_fn.checkpoint.safetensors_files import BITS, INTEGERS, read_header


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("more", [0, 1])
def test_numbers_of_every_dtype_have_the_bytes_that_safetensors_says(dtype: str, more: int, tmp_path: Path) -> None:
    """A file of 8 values, and one with an extra byte."""
    size = BITS[dtype] + more
    header = json.dumps({"w": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(size)
    (tmp_path / "w.safetensors").write_bytes(data)
    if more:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(data)
        with pytest.raises(ValueError, match=rf"w has {size} bytes; expected {size - 1} for {dtype} \[8\]"):
            read_header(tmp_path / "w.safetensors")
    else:
        assert safetensors.deserialize(data)[0][1]["dtype"] == dtype
        assert read_header(tmp_path / "w.safetensors")["w"].dtype == dtype


@pytest.mark.parametrize("dtype", INTEGERS.values(), ids=str)
def test_tables_of_ids_may_be_of_every_integer_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    layout = next(
        layout
        for layout in LAYOUTS
        if layout.savable and any(e.weight[-1] == "expert_ids_of_token" for e in layout.entries)
    )
    config = MoEConfig(
        num_experts=3,
        top_k=2,
        hidden_size=4,
        intermediate_size=2,
        router=moe_fn.RouterConfig(scoring="sigmoid", selection="hash"),
    )
    weights = weights_for(config, bias=False, scales=False)
    prefix = f"layers.0.{layout.block}"
    save_moe_weights(tmp_path, prefix, config, weights, layout=layout)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {n: t if t.is_floating_point() else t.to(dtype) for n, t in tensors.items()}, tmp_path / "model.safetensors"
    )
    loaded = load_moe_weights(tmp_path, prefix, config, layout=layout)
    assert loaded.router is not None and weights.router is not None
    assert torch.equal(loaded.router.expert_ids_of_token, weights.router.expert_ids_of_token)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", _DTYPES)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_every_dtype_of_a_model_is_known(name: str, key: str) -> None:
    assert (
        dtype_of_floats({key: name}) == dtype_of_floats({"text_config": {key: f"torch.{name}"}}) == getattr(torch, name)
    )


@pytest.mark.parametrize("part", _PARTS)
def test_an_adapter_of_every_name_of_a_module_of_an_expert(part: str, tmp_path: Path) -> None:
    config = MoEConfig(num_experts=2, top_k=1, hidden_size=6, intermediate_size=4)
    places = {"gate": slice(0, 4), "up": slice(4, 8), "gate_up": slice(0, 8)}
    size, out = (4, 6) if _PARTS[part] == "down" else (6, 8 if _PARTS[part] == "gate_up" else 4)
    a, b = torch.randn(2, size), torch.randn(out, 2)
    module = f"base_model.model.layers.0.mlp.experts.1.{part}"
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    lora = load_lora(tmp_path, "layers.0.mlp", config)
    product, other = ("down", "gate_up") if _PARTS[part] == "down" else ("gate_up", "down")
    wanted = torch.zeros(2, 6, 4) if product == "down" else torch.zeros(2, 8, 6)
    wanted[1, places.get(_PARTS[part], slice(None))] = b @ a
    assert_matches(getattr(lora, f"{product}_b")[0] @ getattr(lora, f"{product}_a")[0], wanted)
    assert getattr(lora, f"{other}_a") is None


@pytest.mark.parametrize("method", _READERS)
def test_every_method_has_a_file_that_says_it(method: str, tmp_path: Path) -> None:
    """mxfp4 of gpt-oss is in `test_checkpoint_published`; older NVFP4 files have ModelOpt's other name."""
    if method == "mxfp4":
        return
    wanted = "modelopt" if method == "modelopt_fp4" else method
    name, made = next(
        (n, f)
        for n, f in FORMATS.items()
        if f.words.get("quant_method") == wanted and method in (wanted, f"{wanted}_fp4")
    )
    written = write(tmp_path, made, quant_method=method)
    config, weights = load_moe_layer(tmp_path, 1)
    assert config.quant == made.quant, name
    floats = moe_fn.dequantize_weights(config, weights)[1]
    assert torch.equal(floats.gate_up, written.gate_up) and torch.equal(floats.down, written.down)


def test_projections_of_a_latent_space_may_be_quantized(tmp_path: Path) -> None:
    made: Format = FORMATS["ct fp8 weight-only"]
    random, inner, prefix = np.random.default_rng(0), 32, "backbone.layers.1.mixer"
    sizes = {"fc1_latent_proj": (inner, X), "fc2_latent_proj": (X, inner)}
    for module in [*(f"experts.{e}" for e in range(E)), "shared_experts"]:
        width = inner if "." in module else X
        sizes |= {f"{module}.up_proj": (16, width), f"{module}.down_proj": (width, 16)}
    modules = {name: made.lay(random, *size) for name, size in sizes.items()}
    tensors = {
        f"{prefix}.{name}{suffix}": t for name, matrix in modules.items() for suffix, t in matrix.tensors.items()
    }
    save(
        tmp_path,
        tensors | {f"{prefix}.gate.weight": torch.ones(E, X), f"{prefix}.gate.e_score_correction_bias": torch.zeros(E)},
    )
    values = {
        "model_type": "nemotron_h", "n_routed_experts": E, "num_experts_per_tok": 1, "hidden_size": X,
        "moe_intermediate_size": 16,
        "moe_latent_size": inner, "moe_shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
        "dtype": "float32",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": made.words}))
    latent = load_moe_layer(tmp_path, 1)[1].latent
    assert latent is not None
    for name, found in (("fc1_latent_proj", latent.input), ("fc2_latent_proj", latent.output)):
        assert torch.equal(found, torch.from_numpy(modules[name].floats.astype(np.float32))), name


@pytest.mark.parametrize("name", _FLOATS)
def test_a_limit_that_json_has_no_number_for(name: str) -> None:
    values = {"model_type": "gpt_oss", "swiglu_limit": {"__float__": name}}
    if name == "Infinity":
        activation = config_of_layer(values, 0).activation
        assert isinstance(activation, ActivationConfig) and activation.limit is None
        return
    with pytest.raises(ValueError, match=f"(?i)swiglu_limit.*{'nan' if math.isnan(_FLOATS[name]) else '-inf'}"):
        config_of_layer(values, 0)


def test_no_family_has_the_name_of_a_model_of_parts() -> None:
    """Such a family would never be found: the model type of the part is looked up."""
    names = [name for family in FAMILIES for name in family.names]
    assert len(names) == len(set(names)) and not set(names) & set(PARTS)
    for model_type in PARTS:
        assert model_type in error_of({"model_type": "unknown"})


def error_of(values: dict[str, Any]) -> list[str]:
    """Returns the names in the error for an unknown model_type."""
    with pytest.raises(ValueError, match="model_type is 'unknown'; expected one of") as caught:
        config_of_layer(values, 0)
    return re.split("of |, ", str(caught.value))


def test_every_block_of_a_family_is_one_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    if not transformers.__version__.startswith("5.23."):
        pytest.skip("rows are of the blocks of transformers 5.23")
    source = "".join(path.read_text() for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))
    missing = [name for family in FAMILIES for name in family.blocks if f"\nclass {name}(" not in source]
    assert not missing


def test_every_activation_of_transformers_is_the_function_that_its_row_says() -> None:
    pytest.importorskip("transformers")
    from moe_fn.integrations.transformers.gates import ACTIVATIONS

    g = torch.linspace(-6, 6, 101, dtype=torch.float64)
    for path, (function, alpha) in ACTIVATIONS.items():
        if function == "situ":  # of gates and ups together: `test_transformers_zoo` has its model
            continue
        module, _, name = path.rpartition(".")
        theirs = getattr(importlib.import_module(module), name)
        theirs = theirs() if isinstance(theirs, type) else theirs
        assert_matches(
            theirs(g), gate_function(ActivationConfig(function=function, alpha=alpha), g), tolerance=1e-6, name=path
        )
