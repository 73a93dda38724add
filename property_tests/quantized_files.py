"""Quantized checkpoints for tests, written by numpy as their formats are documented, without code of moe_fn.

Every format makes a matrix from random codes and scales: the tensors of a file by the suffixes of their names, and the
floats that they encode. `test_quantized_tools` compares the formats with the tools that write them, where those are
installed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_fn import ActivationQuantConfig, QuantConfig

Random = np.random.Generator
E, X, WIDTH = 3, 64, 96  # experts, hidden, intermediate
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@dataclass(frozen=True)
class Matrix:
    """Tensors by suffix, and the floats [outputs, inputs] float32 that they encode."""

    tensors: dict[str, Tensor]
    floats: np.ndarray


@dataclass(frozen=True)
class Format:
    """A format: `words` is quantization_config, `quant` the QuantConfig that must be read from it, `lay` makes a matrix
    from (random, outputs, inputs).
    """

    words: dict[str, Any]
    quant: QuantConfig
    lay: Callable[[Random, int, int], Matrix]
    hf_quant_config: bool = False


def of_e4m3(code: int) -> float:
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def of_e2m1(code: int) -> float:
    return -E2M1[code & 7] if code & 8 else E2M1[code & 7]


FLOAT_OF_E4M3 = np.array([np.nan if code & 127 == 127 else of_e4m3(code) for code in range(256)], np.float32)
FLOAT_OF_E2M1 = np.array([of_e2m1(code) for code in range(16)], np.float32)


def e4m3_codes(random: Random, *shape: int, positive: bool = False) -> np.ndarray:
    codes = random.integers(0, 127, shape).astype(np.uint8)  # 127 is NaN
    return codes if positive else codes | (random.integers(0, 2, shape) << 7).astype(np.uint8)


def fp8(codes: np.ndarray) -> Tensor:
    return torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn)


def scales(random: Random, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, np.ndarray]:
    """Returns random scales as stored in a file, and as float32."""
    made = torch.from_numpy(random.uniform(0.01, 0.1, shape).astype(np.float32)).to(dtype)
    return made, made.float().numpy()


def over(values: np.ndarray, tile: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Repeats the value of each tile over the tile."""
    return np.repeat(np.repeat(values, tile[0], 0), tile[1], 1)[: shape[0], : shape[1]]


def pack_int32(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Packs codes along the last dim into int32, the first in the low bits; order[j] is the place of the j-th code."""
    each = 32 // bits
    padded = np.pad(codes.astype(np.uint64), [(0, 0), (0, -codes.shape[1] % each)])
    words = np.zeros((padded.shape[0], padded.shape[1] // each), np.uint64)
    for column in range(padded.shape[1]):
        place = column % each if order is None else order[column % each]
        words[:, column // each] |= padded[:, column] << np.uint64(bits * place)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def nibbles(codes: np.ndarray) -> np.ndarray:
    return (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)


def plain_fp8(
    tile: Callable[[int, int], tuple[int, int]],
    names: tuple[str, str, str | None],
    dtype: torch.dtype = torch.float32,
    dims: int = 2,
) -> Callable[[Random, int, int], Matrix]:
    """fp8 with float scales; names: of weight, scale and input scale; dims: number of dimensions of a scale."""

    def make(random: Random, outputs: int, inputs: int) -> Matrix:
        codes, (high, wide) = e4m3_codes(random, outputs, inputs), tile(outputs, inputs)
        scale, floats = scales(random, -(-outputs // high), -(-inputs // wide), dtype=dtype)
        tensors = {
            names[0]: fp8(codes),
            names[1]: scale if dims == 2 else scale.flatten() if dims == 1 else scale.reshape(()),
        }
        if names[2]:
            tensors[names[2]] = torch.full([1] * dims, 0.25)
        return Matrix(tensors, FLOAT_OF_E4M3[codes] * over(floats, (high, wide), codes.shape))

    return make


def blocks_of_powers(random: Random, outputs: int, inputs: int) -> Matrix:
    """fp8 in blocks (32, 16), scales as float8_e8m0fnu."""
    codes, exponents = (
        e4m3_codes(random, outputs, inputs),
        random.integers(100, 140, (outputs // 32, inputs // 16)).astype(np.uint8),
    )
    powers = np.exp2(exponents.astype(np.float32) - 127)
    tensors = {".weight": fp8(codes), ".weight_scale_inv": torch.from_numpy(exponents).view(torch.float8_e8m0fnu)}
    return Matrix(tensors, FLOAT_OF_E4M3[codes] * over(powers, (32, 16), codes.shape))


def whole(outputs: int, inputs: int) -> tuple[int, int]:
    return outputs, inputs


def row(outputs: int, inputs: int) -> tuple[int, int]:
    return 1, inputs


def int_rows(bits: int, zeros: bool) -> Callable[[Random, int, int], Matrix]:
    """compressed-tensors int-quantized, one scale a channel."""

    def make(random: Random, outputs: int, inputs: int) -> Matrix:
        half = 2 ** (bits - 1)
        codes = random.integers(-half, half, (outputs, inputs)).astype(np.int8)
        scale, floats = scales(random, outputs, 1, dtype=torch.bfloat16)
        zero = random.integers(-half, half, (outputs, 1)).astype(np.int8) if zeros else np.zeros((outputs, 1), np.int8)
        tensors = {".weight": torch.from_numpy(codes), ".weight_scale": scale}
        tensors |= {".weight_zero_point": torch.from_numpy(zero)} if zeros else {}
        return Matrix(tensors, (codes.astype(np.float32) - zero) * floats)

    return make


def packed(bits: int, group: int | None, zeros: bool) -> Callable[[Random, int, int], Matrix]:
    """compressed-tensors pack-quantized: codes of inputs in int32, offset by half their range; zero points packed along
    the outputs.
    """

    def make(random: Random, outputs: int, inputs: int) -> Matrix:
        codes, size = random.integers(0, 2**bits, (outputs, inputs)), group or inputs
        scale, floats = scales(random, outputs, inputs // size, dtype=torch.bfloat16)
        zero = random.integers(0, 2**bits, floats.shape) if zeros else np.full(floats.shape, 2 ** (bits - 1))
        tensors = {
            ".weight_packed": pack_int32(codes, bits), ".weight_scale": scale,
            ".weight_shape": torch.tensor([outputs, inputs]),
        }  # fmt: skip
        tensors |= {".weight_zero_point": pack_int32(zero.T, bits).T.contiguous()} if zeros else {}
        shape = codes.shape
        return Matrix(
            tensors, (codes - over(zero, (1, size), shape)).astype(np.float32) * over(floats, (1, size), shape)
        )

    return make


def nvfp4(names: tuple[str, str, str, str | None], inverted: bool) -> Callable[[Random, int, int], Matrix]:
    """NVFP4; names: of codes, scale, global scale and input scale; inverted: the global scale divides, as in
    compressed-tensors.
    """

    def make(random: Random, outputs: int, inputs: int) -> Matrix:
        codes, scale = (
            random.integers(0, 16, (outputs, inputs)),
            e4m3_codes(random, outputs, inputs // 16, positive=True),
        )
        above = np.float32(2.0 ** random.integers(-9, -4) if inverted else random.uniform(0.001, 0.1))
        size = np.float32(1 / above if inverted else above)
        tensors = {
            names[0]: torch.from_numpy(nibbles(codes)),
            names[1]: fp8(scale),
            names[2]: torch.tensor([size] if inverted else size),
        }
        if names[3] is not None:
            tensors[names[3]] = torch.tensor([4.0] if inverted else 0.25)
        return Matrix(tensors, FLOAT_OF_E2M1[codes] * over(FLOAT_OF_E4M3[scale], (1, 16), codes.shape) * above)

    return make


def mx(
    names: tuple[str, str], bits: int, e8m0: bool = False, signed: bool = False, blocks: bool = False
) -> Callable[[Random, int, int], Matrix]:
    """MX formats: power-of-two scales of 32 inputs, as bytes or as float8_e8m0fnu."""

    def make(random: Random, outputs: int, inputs: int) -> Matrix:
        exponents = random.integers(100, 140, (outputs, inputs // 32)).astype(np.uint8)
        if bits == 8:
            codes = e4m3_codes(random, outputs, inputs)
            payload, floats = fp8(codes), FLOAT_OF_E4M3[codes]
        else:
            codes = random.integers(0, 16, (outputs, inputs))
            payload, floats = torch.from_numpy(nibbles(codes)), FLOAT_OF_E2M1[codes]
        payload = payload.view(torch.int8) if signed else payload
        scale = torch.from_numpy(exponents.copy())
        powers = np.exp2(exponents.astype(np.float32) - 127)
        payload = payload.reshape(outputs, inputs // 32, 16) if blocks else payload
        tensors = {names[0]: payload, names[1]: scale.view(torch.float8_e8m0fnu) if e8m0 else scale}
        return Matrix(tensors, floats * over(powers, (1, 32), (outputs, inputs)))

    return make


def gptq(bits: int, group: int | None, symmetric: bool, stored_less: int) -> Callable[[Random, int, int], Matrix]:
    """GPTQ: [inputs, outputs], codes packed along the inputs in int32, zero points along the outputs; the first version
    stores them less one (stored_less).
    """

    def make(random: Random, outputs: int, inputs: int) -> Matrix:
        size = group or inputs
        codes, middle = random.integers(0, 2**bits, (outputs, inputs)), 2 ** (bits - 1)
        scale, floats = scales(random, inputs // size, outputs, dtype=torch.float16)
        zero = (
            np.full((inputs // size, outputs), middle)
            if symmetric
            else random.integers(0, 2**bits, (inputs // size, outputs))
        )
        tensors = {
            ".qweight": pack_int32(codes, bits).T.contiguous(),
            ".qzeros": pack_int32((zero - stored_less) % 2**bits, bits),
            ".scales": scale,
            ".g_idx": (torch.arange(inputs) // size).to(torch.int32),
        }
        shape = codes.shape
        return Matrix(
            tensors, (codes - over(zero.T, (1, size), shape)).astype(np.float32) * over(floats.T, (1, size), shape)
        )

    return make


def awq(group: int | None, symmetric: bool) -> Callable[[Random, int, int], Matrix]:
    """AWQ: [inputs, outputs], codes packed along the outputs in int32, in AutoAWQ's order."""

    def make(random: Random, outputs: int, inputs: int) -> Matrix:
        size = group or inputs
        codes, order = random.integers(0, 16, (outputs, inputs)), (0, 4, 1, 5, 2, 6, 3, 7)
        scale, floats = scales(random, inputs // size, outputs, dtype=torch.float16)
        zero = np.full((inputs // size, outputs), 8) if symmetric else random.integers(0, 16, (inputs // size, outputs))
        tensors = {".qweight": pack_int32(codes.T, 4, order), ".qzeros": pack_int32(zero, 4, order), ".scales": scale}
        shape = codes.shape
        return Matrix(
            tensors, (codes - over(zero.T, (1, size), shape)).astype(np.float32) * over(floats.T, (1, size), shape)
        )

    return make


def compressed(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the quantization_config of compressed-tensors, which excludes the router, as in all published models."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"], "quantization_status": "compressed", "kv_cache_scheme": None,
    }  # fmt: skip


def kind(name: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"type": name, "num_bits": bits, "strategy": strategy, "symmetric": True, "dynamic": False, **more}


def inputs_of(scheme: Any, granularity: Any, **more: Any) -> ActivationQuantConfig:
    return ActivationQuantConfig(scheme=scheme, granularity=granularity, **more)


TOKENS = {"fp8_e4m3": kind("float", 8, "token", dynamic=True), "int8": kind("int", 8, "token", dynamic=True)}
CT_FP8 = (".weight", ".weight_scale", None)
INVERSE = (".weight", ".weight_scale_inv", None)
GPTQ_WORDS = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ_WORDS = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["gate"],
}
MODELOPT = {"producer": {"name": "modelopt"}, "quant_method": "modelopt", "ignore": ["lm_head", "*.mlp.gate"]}
STATIC = inputs_of("fp8_e4m3", "tensor", static=True)


def group(scheme: Any, size: int, **more: Any) -> QuantConfig:
    return QuantConfig(scheme=scheme, granularity="group", group_size=size, **more)


FORMATS: dict[str, Format] = {
    "ct fp8 tensor": Format(
        compressed("float-quantized", kind("float", 8, "tensor"), kind("float", 8, "tensor")),
        QuantConfig(scheme="fp8_e4m3", granularity="tensor", activations=STATIC),
        plain_fp8(whole, (*CT_FP8[:2], ".input_scale"), torch.bfloat16, 1),
    ),
    "ct fp8 channel": Format(
        compressed("float-quantized", kind("float", 8, "channel"), TOKENS["fp8_e4m3"]),
        QuantConfig(scheme="fp8_e4m3", granularity="channel", activations=inputs_of("fp8_e4m3", "token")),
        plain_fp8(row, CT_FP8, torch.bfloat16),
    ),
    "ct fp8 weight-only": Format(
        compressed("naive-quantized", kind("float", 8, "channel")), 
        QuantConfig(scheme="fp8_e4m3", granularity="channel"), plain_fp8(row, CT_FP8),
    ),
    "ct fp8 block": Format(
        compressed(
            "float-quantized", kind("float", 8, "block", block_structure=[16, 32]),
            kind("float", 8, "group", group_size=32, dynamic=True),
        ),
        QuantConfig(
            scheme="fp8_e4m3", granularity="block", block_shape=(16, 32),
            activations=inputs_of("fp8_e4m3", "group", group_size=32),
        ),
        plain_fp8(lambda n, k: (16, 32), CT_FP8),
    ),
    "ct int8": Format(
        compressed("int-quantized", kind("int", 8, "channel"), TOKENS["int8"]),
        QuantConfig(scheme="int8", granularity="channel", activations=inputs_of("int8", "token")), int_rows(8, False),
    ),
    "ct int8 zeros": Format(
        compressed("int-quantized", kind("int", 8, "channel", symmetric=False), TOKENS["int8"]),
        QuantConfig(scheme="int8", granularity="channel", zero_points=True, activations=inputs_of("int8", "token")),
        int_rows(8, True),
    ),
    "ct w4a16": Format(compressed("pack-quantized", kind("int", 4, "group", group_size=32)), group("int4", 32),
    packed(4, 32, False)),
    "ct int4": Format(
        compressed("int-quantized", kind("int", 4, "channel"), TOKENS["fp8_e4m3"]),
        QuantConfig(scheme="int4", granularity="channel", activations=inputs_of("fp8_e4m3", "token")),
        int_rows(4, False),
    ),
    "ct int4 zeros": Format(
        compressed("naive-quantized", kind("int", 4, "channel", symmetric=False)),
        QuantConfig(scheme="int4", granularity="channel", zero_points=True), int_rows(4, True),
    ),
    "ct int8 naive": Format(
        compressed("naive-quantized", kind("int", 8, "channel")), QuantConfig(scheme="int8", granularity="channel"),
        int_rows(8, False),
    ),
    "ct w4a16 zeros": Format(
        compressed("pack-quantized", kind("int", 4, "group", group_size=32, symmetric=False)),
        group("int4", 32, zero_points=True),
        packed(4, 32, True),
    ),
    "ct w4a16 channel": Format(
        compressed("pack-quantized", kind("int", 4, "channel", group_size=-1, symmetric=False)),
        QuantConfig(scheme="int4", granularity="channel", zero_points=True), packed(4, None, True),
    ),
    "ct w4a8": Format(
        compressed("pack-quantized", kind("int", 4, "group", group_size=32), TOKENS["int8"]),
        group("int4", 32, activations=inputs_of("int8", "token")), packed(4, 32, False),
    ),
    "ct w8a16": Format(compressed("pack-quantized", kind("int", 8, "group", group_size=16)), group("int8", 16),
    packed(8, 16, False)),
    "ct w8a16 zeros": Format(
        compressed("pack-quantized", kind("int", 8, "group", group_size=16, symmetric=False)),
        group("int8", 16, zero_points=True),
        packed(8, 16, True),
    ),
    "ct nvfp4a16": Format(
        compressed("nvfp4-pack-quantized", kind("float", 4, "tensor_group", group_size=16)), group("nvfp4", 16),
        nvfp4((".weight_packed", ".weight_scale", ".weight_global_scale", None), True),
    ),
    "ct nvfp4": Format(
        compressed(
            "nvfp4-pack-quantized", kind("float", 4, "tensor_group", group_size=16),
            kind("float", 4, "tensor_group", group_size=16, dynamic="local"),
        ),
        group("nvfp4", 16, activations=inputs_of("nvfp4", "group", group_size=16, static=True)),
        nvfp4((".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale"), True),
    ),
    "ct mxfp4": Format(
        compressed("mxfp4-pack-quantized", kind("float", 4, "group", group_size=32, scale_dtype="torch.uint8")),
        group("mxfp4", 32),
        mx((".weight_packed", ".weight_scale"), 4),
    ),
    "ct mxfp8": Format(
        compressed(
            "mxfp8-quantized", kind("float", 8, "group", group_size=32, scale_dtype="torch.uint8"),
            kind("float", 8, "group", group_size=32, scale_dtype="torch.uint8", dynamic=True),
        ),
        group("mxfp8", 32, activations=inputs_of("mxfp8", "group", group_size=32)), mx((".weight", ".weight_scale"), 8),
    ),
    "deepseek": Format(
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 16]},
        QuantConfig(
            scheme="fp8_e4m3", granularity="block", block_shape=(32, 16),
            activations=inputs_of("fp8_e4m3", "group", group_size=16),
        ),
        plain_fp8(lambda n, k: (32, 16), INVERSE),
    ),
    "deepseek, ragged": Format(
        {"quant_method": "fp8", "weight_block_size": [40, 48], "scale_fmt": "ue8m0"},
        QuantConfig(
            scheme="fp8_e4m3", granularity="block", block_shape=(40, 48),
            activations=inputs_of("fp8_e4m3", "group", group_size=48, power_of_two_scales=True),
        ),
        plain_fp8(lambda n, k: (40, 48), INVERSE),
    ),
    "deepseek, powers of two": Format(
        {"quant_method": "fp8", "weight_block_size": [32, 16], "scale_fmt": "ue8m0"},
        QuantConfig(
            scheme="fp8_e4m3", granularity="block", block_shape=(32, 16),
            activations=inputs_of("fp8_e4m3", "group", group_size=16, power_of_two_scales=True),
        ),
        blocks_of_powers,
    ),
    "autofp8": Format(
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        QuantConfig(scheme="fp8_e4m3", granularity="tensor", activations=STATIC),
        plain_fp8(whole, (*CT_FP8[:2], ".input_scale"), dims=0),
    ),
    "transformers mxfp8": Format(
        {"quant_method": "mxfp8"}, group("mxfp8", 32, activations=inputs_of("mxfp8", "group", group_size=32)),
        mx((".weight", ".weight_scale_inv"), 8),
    ),
    "gptq": Format(GPTQ_WORDS, group("int4", 32), gptq(4, 32, True, 1)),
    "gptq zeros": Format(GPTQ_WORDS | {"sym": False}, group("int4", 32, zero_points=True), gptq(4, 32, False, 1)),
    "gptq v2": Format(
        GPTQ_WORDS | {"sym": False, "checkpoint_format": "gptq_v2"}, group("int4", 32, zero_points=True),
        gptq(4, 32, False, 0),
    ),
    "gptq v2 symmetric": Format(GPTQ_WORDS | {"checkpoint_format": "gptq_v2"}, group("int4", 32), gptq(4, 32, True, 0)),
    "gptq v2 8 bits": Format(GPTQ_WORDS | {"bits": 8, "checkpoint_format": "gptq_v2"}, group("int8", 32),
    gptq(8, 32, True, 0)),
    "gptq v2 8 bits zeros": Format(
        GPTQ_WORDS | {"bits": 8, "sym": False, "checkpoint_format": "gptq_v2"}, group("int8", 32, zero_points=True),
        gptq(8, 32, False, 0),
    ),
    "gptq 8 bits": Format(GPTQ_WORDS | {"bits": 8}, group("int8", 32), gptq(8, 32, True, 1)),
    "gptq 8 bits zeros": Format(GPTQ_WORDS | {"bits": 8, "sym": False}, group("int8", 32, zero_points=True),
    gptq(8, 32, False, 1)),
    "gptq channel": Format(
        GPTQ_WORDS | {"sym": False, "group_size": -1}, QuantConfig(scheme="int4", granularity="channel",
        zero_points=True),
        gptq(4, None, False, 1),
    ),
    "awq channel": Format(
        AWQ_WORDS | {"group_size": -1}, QuantConfig(scheme="int4", granularity="channel", zero_points=True),
        awq(None, False),
    ),
    "awq": Format(AWQ_WORDS, group("int4", 32, zero_points=True), awq(32, False)),
    "awq symmetric": Format(AWQ_WORDS | {"zero_point": False}, group("int4", 32), awq(32, True)),
    "modelopt fp8": Format(
        MODELOPT | {"quant_algo": "FP8"}, QuantConfig(scheme="fp8_e4m3", granularity="tensor", activations=STATIC),
        plain_fp8(whole, (*CT_FP8[:2], ".input_scale"), dims=0),
    ),
    "modelopt fp8 channel": Format(
        {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "exclude_modules": ["lm_head"]},
        QuantConfig(scheme="fp8_e4m3", granularity="channel", activations=inputs_of("fp8_e4m3", "token")),
        plain_fp8(row, CT_FP8, dims=1),
        hf_quant_config=True,
    ),
    "modelopt nvfp4": Format(
        {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16,
        "exclude_modules": ["lm_head", "model.layers.0*"]},
        group("nvfp4", 16, activations=inputs_of("nvfp4", "group", group_size=16, static=True)),
        nvfp4((".weight", ".weight_scale", ".weight_scale_2", ".input_scale"), False), hf_quant_config=True,
    ),
    "modelopt mixed": Format(
        {
            "quant_algo": "MIXED_PRECISION", "quantized_layers": {
                "model.layers.1.self_attn.q_proj": {"quant_algo": "FP8"},
                "model.layers.1.mlp": {"quant_algo": "NVFP4", "group_size": 16},
            },
        },
        group("nvfp4", 16, activations=inputs_of("nvfp4", "group", group_size=16, static=True)),
        nvfp4((".weight", ".weight_scale", ".weight_scale_2", ".input_scale"), False), hf_quant_config=True,
    ),
    "modelopt nvfp4a16": Format(
        MODELOPT | {"quant_algo": "W4A16_NVFP4"}, group("nvfp4", 16),
        nvfp4((".weight", ".weight_scale", ".weight_scale_2", None), False),
    ),
    "modelopt mxfp8": Format(
        MODELOPT | {"quant_algo": "MXFP8"}, group("mxfp8", 32, activations=inputs_of("mxfp8", "group", group_size=32)),
        mx((".weight", ".weight_scale"), 8),
    ),
}  # fmt: skip

PREFIX = "model.layers.1.mlp"
WORDS = {
    "model_type": "deepseek_v3", "n_routed_experts": E, "num_experts_per_tok": 1, "hidden_size": X,
    "moe_intermediate_size": WIDTH,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
    "dtype": "float32",
}  # fmt: skip
SIZES = {"gate_proj": (WIDTH, X), "up_proj": (WIDTH, X), "down_proj": (X, WIDTH)}


@dataclass(frozen=True)
class Written:
    """The floats of the experts, [E, 2 WIDTH, X] and [E, X, WIDTH], and of the shared experts."""

    gate_up: Tensor
    down: Tensor
    shared_gate_up: Tensor
    shared_down: Tensor


def write(folder: Path, made: Format, seed: int = 0, shards: int = 1, **changes: Any) -> Written:
    """Writes a DeepSeek-V3 model of one layer with quantized experts and shared experts. Returns their floats."""
    random = np.random.default_rng(seed)
    modules = {f"experts.{e}.{name}": made.lay(random, *size) for e in range(E) for name, size in SIZES.items()}
    modules |= {f"shared_experts.{name}": made.lay(random, *size) for name, size in SIZES.items()}
    tensors = {
        f"{PREFIX}.{module}{suffix}": t for module, matrix in modules.items() for suffix, t in matrix.tensors.items()
    }
    tensors[f"{PREFIX}.gate.weight"] = torch.from_numpy(
        random.standard_normal((E, WORDS["hidden_size"])).astype(np.float32)
    )
    tensors[f"{PREFIX}.gate.e_score_correction_bias"] = torch.zeros(E)
    save(folder, tensors, shards)
    save_words(folder, made, **changes)

    def floats(name: str) -> Tensor:
        return torch.from_numpy(modules[name].floats.astype(np.float32))

    def gates_and_ups(module: str) -> Tensor:
        return torch.cat([floats(f"{module}.gate_proj"), floats(f"{module}.up_proj")])

    return Written(
        torch.stack([gates_and_ups(f"experts.{e}") for e in range(E)]),
        torch.stack([floats(f"experts.{e}.down_proj") for e in range(E)]),
        gates_and_ups("shared_experts"),
        floats("shared_experts.down_proj"),
    )


def save(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    from safetensors.torch import save_file

    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    files = {name: f"model-{place % shards}.safetensors" for place, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def save_words(folder: Path, made: Format, **changes: Any) -> None:
    quant = made.words | changes
    words = WORDS if made.hf_quant_config else WORDS | {"quantization_config": quant}
    (folder / "config.json").write_text(json.dumps(words))
    if made.hf_quant_config:
        (folder / "hf_quant_config.json").write_text(
            json.dumps({"producer": {"name": "modelopt"}, "quantization": quant})
        )
