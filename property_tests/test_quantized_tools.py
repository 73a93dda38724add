"""Quantized checkpoints compared with the tools that write them: packed and unpacked by the code of the tool, where it
is installed.

compressed-tensors 0.20, ModelOpt 0.47, AutoAWQ 0.2.7, AutoRound 0.16 (GPTQ's packing), transformers 5.23 (fp8, mxfp4).
The tools round to the dtype of their scales, so values that are read here are rounded to it once; the tools may
multiply float32 factors in another order.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_files import FORMATS, PREFIX, WORDS, E, Format, save, write
from torch import Tensor

from moe_fn import dequantize_weights
from moe_fn.checkpoint import load_moe_layer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed")

X, WIDTH = 128, 256
Made = tuple[dict[str, Tensor], Tensor]  # tensors of a file by suffix, and floats of the tool


def whole_model(folder: Path, words: dict[str, Any], make: Callable[[Tensor], Made]) -> dict[str, Tensor]:
    """Writes a model with matrices quantized by a tool; returns the floats of the tool by module."""
    torch.manual_seed(0)
    tensors, floats = {}, {}
    for module in (*(f"experts.{e}" for e in range(E)), "shared_experts"):
        for name, size in (("gate_proj", (WIDTH, X)), ("up_proj", (WIDTH, X)), ("down_proj", (X, WIDTH))):
            made, floats[f"{module}.{name}"] = make(torch.randn(size).bfloat16() * 0.05)
            tensors |= {f"{PREFIX}.{module}.{name}.{suffix}": t.detach().contiguous() for suffix, t in made.items()}
    tensors |= {f"{PREFIX}.gate.weight": torch.randn(E, X), f"{PREFIX}.gate.e_score_correction_bias": torch.zeros(E)}
    save(folder, tensors)
    config = WORDS | {"hidden_size": X, "moe_intermediate_size": WIDTH, "quantization_config": words}
    (folder / "config.json").write_text(json.dumps(config))
    return floats


def differences(folder: Path, floats: dict[str, Tensor], least: float = 0.0) -> float:
    """Returns the largest difference relative to the floats of the tool; our floats are rounded to their dtype."""
    dtype = next(iter(floats.values())).dtype
    config, weights = load_moe_layer(folder, 1, dtype=dtype)
    ours = dequantize_weights(config, weights, dtype)[1]
    assert weights.shared is not None
    found = {"shared_experts": (weights.shared.gate_up, weights.shared.down)}
    found |= {f"experts.{e}": (ours.gate_up[e], ours.down[e]) for e in range(E)}
    worst = least
    for module, (gate_up, down) in found.items():
        theirs = torch.cat([floats[f"{module}.gate_proj"], floats[f"{module}.up_proj"]]), floats[f"{module}.down_proj"]
        for mine, other in zip((gate_up, down), theirs, strict=True):
            assert mine.dtype == other.dtype and mine.shape == other.shape
            worst = max(
                worst, float(((mine.double() - other.double()).abs() / other.double().abs().clamp(min=1e-30)).max())
            )
    return worst


PRESETS = (
    "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16", "W4A16_ASYM", "W8A16", "W4A8", "W4AFP8",
    "NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4", "MXFP8A16", "MXFP8",
)  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_compressed_tensors_presets(preset: str, tmp_path: Path) -> None:
    compressed_tensors = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    assert compressed_tensors
    scheme = preset_name_to_scheme(preset, ["Linear"])
    layout, args = infer_module_format(torch.nn.Linear, scheme), scheme.weights
    compressor = BaseCompressor.get_value_from_registry(layout.value)

    def make(weight: Tensor) -> Made:
        state: dict[str, Tensor] = {"weight": weight}
        out, inner = {
            "tensor": weight.shape, "channel": (1, weight.shape[1]), "group": (1, args.group_size),
            "tensor_group": (1, args.group_size),
            "block": args.block_structure,
        }[str(args.strategy)]  # fmt: skip
        tiles = weight.unflatten(1, (-1, inner)).unflatten(0, (-1, out))
        least, most = tiles.amin((1, 3)), tiles.amax((1, 3))
        above = generate_gparam(weight.amin(), weight.amax()).reshape(1) if args.strategy == "tensor_group" else None
        scale, zero = calculate_qparams(least, most, args, global_scale=above)
        state |= {"weight_scale": scale.reshape(1) if args.strategy == "tensor" else scale, "weight_zero_point": zero}
        if above is not None:
            state["weight_global_scale"] = above
        inputs = scheme.input_activations
        if inputs is not None and inputs.dynamic is not True:
            state["input_global_scale" if inputs.dynamic == "local" else "input_scale"] = torch.tensor([0.5])
        packed = compressor.compress(state, scheme)
        return packed, compressor.decompress(packed, scheme)["weight"]

    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=layout.value, ignore=["lm_head", "re:.*mlp.gate$"]
    )
    floats = whole_model(tmp_path, json.loads(config.model_dump_json()), make)
    # nvfp4: they divide the scale by the global one first, here its inverse comes last: a float32, seldom a bfloat16,
    # rounds otherwise
    assert differences(tmp_path, floats) <= (2.0**-8 if "NVFP4" in preset else 0)


MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4", "MXFP8")


@pytest.mark.parametrize("algorithm", MODELOPT)
def test_modelopt(algorithm: str, tmp_path: Path) -> None:
    pytest.importorskip("modelopt.torch.quantization")
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.export.quant_utils import to_quantized_weight
    from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor

    def make(weight: Tensor) -> Made:
        inputs = {"input_scale": torch.tensor(0.5)} if algorithm in ("FP8", "NVFP4") else {}
        if "NVFP4" in algorithm:
            codes, scale, above = NVFP4QTensor.quantize(weight, 16)
            floats = codes.dequantize(torch.float32, scale=scale, double_scale=above, block_sizes={-1: 16})
            return {"weight": codes._quantized_data, "weight_scale": scale, "weight_scale_2": above, **inputs}, floats
        if algorithm == "MXFP8":
            coded, scale = MXFP8QTensor.quantize(weight)
            return {"weight": coded._quantized_data, "weight_scale": scale}, coded.dequantize(
                torch.float32, scale=scale
            )
        amax = weight.float().abs().amax() if algorithm == "FP8" else weight.float().abs().amax(1)
        scale = amax / 448
        name = "fp8" if algorithm == "FP8" else "fp8_pc_pt"
        codes = to_quantized_weight(weight, scale, name)
        return {"weight": codes, "weight_scale": scale, **inputs}, codes.float() * (
            scale if algorithm == "FP8" else scale[:, None]
        )

    quantization = {"quant_algo": algorithm, "exclude_modules": ["lm_head", "*.mlp.gate"], "kv_cache_quant_algo": None}
    quantization |= {"group_size": 16} if "NVFP4" in algorithm else {}
    words = convert_hf_quant_config_format(
        {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": quantization}
    )
    floats = whole_model(tmp_path, words, make)
    assert differences(tmp_path, floats) <= (2.0**-23 if "NVFP4" in algorithm else 0)


@pytest.mark.parametrize("size", [32, 128])
def test_autoawq(size: int, tmp_path: Path) -> None:
    pytest.importorskip("awq.utils.packing_utils")
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    def make(weight: Tensor) -> Made:
        groups = weight.float().unflatten(1, (-1, size))
        least, most = groups.amin(-1), groups.amax(-1)
        scales = ((most - least) / 15).half()
        zeros = (-least / scales).round().clamp(0, 15)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float32)
        steps, starts = scales.float().repeat_interleave(size, 1), zeros.repeat_interleave(size, 1)
        codes = (weight.float() / steps + starts).round().clamp(0, 15)  # AutoAWQ packs values that are already rounded
        linear.weight.data = (codes - starts) * steps
        made = WQLinear_GEMM.from_linear(linear, 4, size, False, scales.T.contiguous().float(), zeros.T.contiguous())
        return dict(made.named_buffers()), dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, size).T

    words = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["gate"],
    }
    assert differences(tmp_path, whole_model(tmp_path, words, make)) == 0


GPTQ = ((4, True, "gptq"), (4, False, "gptq"), (4, False, "gptq_v2"), (8, True, "gptq"), (8, False, "gptq"))


@pytest.mark.parametrize(("bits", "symmetric", "version"), GPTQ)
def test_gptq_as_autoround_packs_it(bits: int, symmetric: bool, version: str, tmp_path: Path) -> None:
    pytest.importorskip("auto_round")
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    kind, size, top = (qlinear_torch_zp if version == "gptq" else qlinear_torch).QuantLinear, 64, 2**bits - 1

    def make(weight: Tensor) -> Made:
        groups = weight.float().unflatten(1, (-1, size))
        least, most = groups.amin(-1), groups.amax(-1)
        scales = ((most - least) / top).half().float()
        zeros = torch.full_like(scales, 2 ** (bits - 1)) if symmetric else (-least / scales).round().clamp(1, top)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.float()
        made = kind(bits, size, weight.shape[1], weight.shape[0], False)
        made.device = "cpu"
        made.pack(linear, scales, zeros.to(torch.int32), device="cpu")
        made.post_init()
        floats = made(torch.eye(weight.shape[1], dtype=torch.float16)).T
        return {name: t for name, t in made.named_buffers() if name in ("qweight", "qzeros", "scales", "g_idx")}, floats

    words = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "sym": symmetric,
        "desc_act": False,
        "checkpoint_format": version,
    }
    assert differences(tmp_path, whole_model(tmp_path, words, make)) == 0


@pytest.mark.parametrize("name", ["deepseek", "deepseek, powers of two", "transformers mxfp8"])
def test_transformers_fp8(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers.integrations.finegrained_fp8")
    from safetensors.torch import load_file
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    made: Format = FORMATS[name]
    write(tmp_path, made)
    file, decode = load_file(tmp_path / "model.safetensors"), Fp8Dequantize(None)._dequantize_one
    stems = [tensor.removesuffix(".weight") for tensor in file if tensor.endswith("_proj.weight")]
    floats = {
        stem.removeprefix(f"{PREFIX}."): decode(file[f"{stem}.weight"], file[f"{stem}.weight_scale_inv"], torch.float32)
        for stem in stems
    }
    assert len(floats) == 3 * (E + 1) and differences(tmp_path, floats) == 0


def test_transformers_mxfp4() -> None:
    """Every code with every exponent that float32 can represent."""
    pytest.importorskip("transformers.integrations.mxfp4")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from moe_fn import QuantConfig
    from moe_fn.quant.codes import Codes, decoded

    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 250, 16, 16).contiguous()
    scales = torch.arange(1, 251, dtype=torch.uint8).view(1, 250, 1).expand(1, 250, 16).contiguous()
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    quant = QuantConfig(scheme="mxfp4", granularity="group", group_size=32)
    assert torch.equal(decoded(quant, Codes(codes=blocks.flatten(2), scale=scales), 1, torch.float32), theirs)
