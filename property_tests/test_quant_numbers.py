"""Number formats of few bits, compared with other implementations: every code, and every float16 that is rounded to a
code.
"""

import pytest
import torch
from torch import Tensor

from moe_fn import QuantConfig
from moe_fn.quant.codes import Codes, decoded
from moe_fn.quant.numbers import decode_e2m1, decode_e8m0, encode_e2m1, encode_e4m3, pack_halves, unpack_halves

CODES = torch.arange(256, dtype=torch.uint8)
HALVES = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16).float()  # every float16


def same(a: Tensor, b: Tensor) -> bool:
    """Checks that tensors are bitwise equal; any NaN equals any other."""
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


def test_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    import numpy as np

    def floats(codes: Tensor, kind: str) -> Tensor:
        return torch.from_numpy(codes.numpy().view(getattr(ml_dtypes, kind)).astype(np.float32))

    assert same(CODES.view(torch.float8_e4m3fn).float(), floats(CODES, "float8_e4m3fn"))
    assert same(decode_e2m1(CODES[:16], torch.float32), floats(CODES[:16], "float4_e2m1fn"))
    assert same(decode_e8m0(CODES, torch.float32), floats(CODES, "float8_e8m0fnu"))
    within = HALVES[HALVES.abs() <= 448]
    nearest = torch.from_numpy(within.numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8).copy())
    assert torch.equal(encode_e4m3(within).view(torch.uint8), nearest)
    finite = HALVES[HALVES.isfinite()]
    nearest = torch.from_numpy(finite.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8).copy())
    assert torch.equal(encode_e2m1(finite), nearest & 15)


def test_gguf_mxfp4() -> None:
    """ggml's blocks start with an exponent, and have their first sixteen values in the low halves of the bytes."""
    gguf = pytest.importorskip("gguf")
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (252, 32), generator=random, dtype=torch.uint8)
    exponents = torch.arange(1, 253, dtype=torch.uint8)[:, None]
    blocks = torch.cat([exponents, codes[:, :16] | codes[:, 16:] << 4], 1)
    theirs = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.MXFP4))
    quant = QuantConfig(scheme="mxfp4", granularity="group", group_size=32)
    ours = decoded(quant, Codes(codes=pack_halves(codes)[None], scale=exponents[None]), 1, torch.float32)[0]
    assert torch.equal(ours, theirs.view(252, 32))


def test_torchao() -> None:
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    assert same(decode_e2m1(CODES[:16], torch.float32), kernels.f4_unpacked_to_f32(CODES[:16]))
    finite = HALVES[HALVES.isfinite()]
    assert torch.equal(encode_e2m1(finite), kernels.f32_to_f4_unpacked(finite))
    assert torch.equal(unpack_halves(CODES), kernels.unpack_uint4(CODES))


def test_onnxruntime() -> None:
    """DequantizeLinear: fp8 codes with a scale for each row, 4-bit codes with a scale and a zero point for
    each group of inputs.
    """
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    random = torch.Generator().manual_seed(0)

    def run(codes: Tensor, kind: int, scale: Tensor, zero: Tensor | None, **more: int) -> Tensor:
        shape = [codes.shape[0], codes.shape[1] * (2 if kind == kinds.UINT4 else 1)]
        constants = [helper.make_tensor("q", kind, shape, codes.numpy().tobytes(), raw=True)]
        constants.append(helper.make_tensor("s", kinds.FLOAT, list(scale.shape), scale.numpy().tobytes(), raw=True))
        names = ["q", "s"]
        if zero is not None:
            constants.append(helper.make_tensor("z", kind, list(scale.shape), zero.numpy().tobytes(), raw=True))
            names.append("z")
        node = helper.make_node("DequantizeLinear", names, ["y"], **more)
        graph = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("y", kinds.FLOAT, shape)], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {})[0])

    scale = torch.rand(4, generator=random)
    codes = CODES.view(1, 256).expand(4, 256).contiguous()
    stored = Codes(codes=codes.view(torch.float8_e4m3fn)[None], scale=scale[None, :, None])
    ours = decoded(QuantConfig(scheme="fp8_e4m3", granularity="channel"), stored, 1, torch.float32)[0]
    assert same(ours, run(codes, kinds.FLOAT8E4M3FN, scale, None, axis=0))
    codes, groups = (
        torch.randint(0, 256, (8, 64), generator=random, dtype=torch.uint8),
        torch.rand(8, 4, generator=random),
    )
    zeros = torch.randint(0, 16, (8, 4), generator=random, dtype=torch.uint8)
    stored = Codes(codes=codes[None], scale=groups[None], zero_point=zeros[None])
    ours = decoded(
        QuantConfig(scheme="int4", granularity="group", group_size=32, zero_points=True), stored, 1, torch.float32
    )[0]
    assert same(ours, run(codes, kinds.UINT4, groups, pack_halves(zeros), axis=1, block_size=32))
