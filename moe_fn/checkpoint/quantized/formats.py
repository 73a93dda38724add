"""The published formats of a quantized matrix, one row each: its tensors in a file with their names, axes and
codings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_fn.checkpoint.quantized.codings import CODINGS
from moe_fn.checkpoint.safetensors_files import FLOATS
from moe_fn.config import ActivationQuantConfig, QuantConfig

QuantDict = Mapping[str, Any]  # quantization_config of config.json
MXFP4 = QuantConfig(scheme="mxfp4", granularity="group", group_size=32)
MXFP8 = QuantConfig(
    scheme="mxfp8", granularity="group", group_size=32,
    activations=ActivationQuantConfig(scheme="mxfp8", granularity="group", group_size=32),
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """Quantization of a module's weight; `stored` names a row of FORMATS."""

    quant: QuantConfig
    stored: str


@dataclass(frozen=True)
class Module:
    """A module of the checkpoint, with the dtypes of its tensors by the suffixes of their names."""

    name: str
    of_experts: bool
    fused: bool
    dtypes: Mapping[str, str]

    @property
    def floats(self) -> bool:
        """Whether the file stores it as floats."""
        return self.dtypes.get("" if self.fused else ".weight") in FLOATS

    @property
    def codes(self) -> str | None:
        """The suffix of the name of its codes in the file; None if it has none."""
        found = (suffix for suffix in CODES if self.dtypes.get(suffix, "F32") not in FLOATS)
        return next(found, None)


@dataclass(frozen=True)
class Stored:
    """One tensor of a matrix.

    role    codes, scale, zero_point, global_scale or input_scale; "check sizes", "check order" and "check zeros" are
            redundant tensors that are validated
    suffix  of its name, after the module's name; several if tools differ
    dims    "out/8 in": outputs, eight per element, and inputs; "/tile": as many as share a scale; "1": a single number
    coding  row of `CODINGS`
    fused   suffix of its name, after that of a tensor that holds all experts; None if no such files are published
    """

    role: str
    suffix: tuple[str, ...]
    dims: str
    coding: str
    fused: str | None = None

    def suffixes(self, fused: bool) -> tuple[str, ...]:
        """The possible suffixes of its name, for a module or for a tensor that holds all experts."""
        return self.suffix if not fused else () if self.fused is None else (self.fused,)


def _codes(suffix: str, dims: str, coding: str, fused: str | None = None) -> Stored:
    return Stored("codes", (suffix,), dims, coding, fused)


def _scale(*suffix: str, coding: str = "float", dims: str = "out/tile in/tile", fused: str | None = None) -> Stored:
    return Stored("scale", suffix, dims, coding, fused)


def _zero(suffix: str, dims: str, coding: str) -> Stored:
    return Stored("zero_point", (suffix,), dims, coding)


def _input(*suffix: str, coding: str = "float32") -> Stored:
    return Stored("input_scale", suffix, "1", coding)


def _gptq(bits: int, less: str, symmetric: bool) -> tuple[Stored, ...]:
    words, zeros = 32 // bits, f"columns of {bits} bits{less}"
    shifted = ", shifted" if symmetric and bits == 8 else ""  # int8 codes are centered at 0, int4 codes at 8
    return (
        _codes(".qweight", f"in/{words} out", f"rows of words{shifted}"),
        _scale(".scales", dims="in/tile out"),
        Stored("check zeros" if symmetric else "zero_point", (".qzeros",), f"in/tile out/{words}", zeros),
        Stored("check order", (".g_idx",), "in", ""),
    )


_PACKED_SIZES = Stored("check sizes", (".weight_shape",), "2", "")
_CT_FP4 = (_codes(".weight_packed", "out in/2", "bytes"),)
_CT_SCALE = _scale(".weight_scale")
_CT_INPUT = _input(".input_scale", coding="float32, agreed")
_SCALE_2 = Stored("global_scale", (".weight_scale_2",), "1", "float32")

FORMATS: dict[str, tuple[Stored, ...]] = {
    # compressed-tensors
    "ct fp8": (_codes(".weight", "out in", "fp8"), _CT_SCALE, _CT_INPUT),
    "ct int8": (_codes(".weight", "out in", "int8"), _CT_SCALE, _CT_INPUT),
    "ct int8, zeros": (
        _codes(".weight", "out in", "int8, shifted"), _CT_SCALE,
        _zero(".weight_zero_point", "out/tile in/tile", "int8, shifted"),
        _CT_INPUT,
    ),
    "ct int4": (_codes(".weight", "out in", "int4 in int8"), _CT_SCALE, _CT_INPUT),
    "ct int4, zeros": (
        _codes(".weight", "out in", "int4 in int8"), _CT_SCALE,
        _zero(".weight_zero_point", "out/tile in/tile", "int4 in int8"), _CT_INPUT,
    ),
    "ct int4, packed": (_codes(".weight_packed", "out in/8", "bytes of words"), _CT_SCALE, _PACKED_SIZES),
    "ct int4, packed, zeros": (
        _codes(".weight_packed", "out in/8", "bytes of words"), _CT_SCALE, _PACKED_SIZES,
        _zero(".weight_zero_point", "out/8 in/tile", "rows of 4 bits"),
    ),
    "ct int8, packed": (_codes(".weight_packed", "out in/4", "int8 of words"), _CT_SCALE, _PACKED_SIZES),
    "ct int8, packed, zeros": (
        _codes(".weight_packed", "out in/4", "bytes of words"), _CT_SCALE, _PACKED_SIZES,
        _zero(".weight_zero_point", "out/4 in/tile", "rows of 8 bits"),
    ),
    "ct nvfp4": (
        *_CT_FP4, _scale(".weight_scale", coding="fp8"),
        Stored("global_scale", (".weight_global_scale",), "1", "inverse"),
        _input(".input_global_scale", coding="inverse"),
    ),
    "ct mxfp4": (*_CT_FP4, _scale(".weight_scale", coding="bytes"), _input(".input_global_scale")),
    "ct mxfp8": (_codes(".weight", "out in", "fp8"), _scale(".weight_scale", coding="bytes")),
    # DeepSeek's, transformers' and AutoFP8's "fp8"
    "fp8": (
        _codes(".weight", "out in", "fp8", fused=""),
        _scale(".weight_scale_inv", ".scale", ".qscale_weight", ".weight_scale", coding="e8m0, spread",
        fused="_scale_inv"),
        _input(".input_scale", ".activation_scale", ".qscale_act"),
    ),
    "mxfp8": (
        _codes(".weight", "out in", "fp8", fused=""),
        _scale(".weight_scale_inv", ".scale", ".qscale_weight", ".weight_scale", coding="bytes", fused="_scale_inv"),
    ),
    "fp4": (
        _codes(".weight", "out in/2", "bytes", fused=""),
        _scale(".weight_scale_inv", ".scale", ".qscale_weight", coding="bytes", fused="_scale_inv"),
    ),
    # gpt-oss
    "mxfp4 blocks": (
        _codes("_blocks", "out in/32 P", "blocks", fused="_blocks"), _scale("_scales", coding="bytes", fused="_scales"),
    ),
    # GPTQ (its second format stores zero points without an offset) and AutoAWQ
    **{
        f"gptq{version} {bits} bits{', symmetric' if symmetric else ''}": _gptq(bits, less, symmetric)
        for version, less in (("", ", less 1"), (" v2", "")) for bits in (4, 8) for symmetric in (False, True)
    },
    "awq": (_codes(".qweight", "in out/8", "awq"), _scale(".scales", dims="in/tile out"),
    _zero(".qzeros", "in/tile out/8", "awq")),
    "awq, symmetric": (
        _codes(".qweight", "in out/8", "awq"), _scale(".scales", dims="in/tile out"),
        Stored("check zeros", (".qzeros",), "in/tile out/8", "awq"),
    ),
    # ModelOpt
    "modelopt fp8": (_codes(".weight", "out in", "fp8"), _CT_SCALE, _input(".input_scale")),
    "modelopt nvfp4": (
        _codes(".weight", "out in/2", "bytes"), _scale(".weight_scale", coding="fp8"), _SCALE_2, _input(".input_scale"),
    ),
    "modelopt mxfp8": (_codes(".weight", "out in", "fp8"), _scale(".weight_scale", coding="bytes")),
}  # fmt: skip

# Suffixes of codes that replace ".weight", and those after the name of a fused tensor
CODES_SUFFIXES = tuple(
    sorted({suffix for row in FORMATS.values() for s in row if s.role == "codes" for suffix in s.suffix} - {"_blocks"})
)
FUSED_SUFFIXES = ("_blocks",)
CODES = (*CODES_SUFFIXES, *FUSED_SUFFIXES, "")
SUFFIXES = tuple(
    sorted({suffix for row in FORMATS.values() for s in row for suffix in s.suffixes(False) + s.suffixes(True)})
)
_NEEDED = ("codes", "scale", "zero_point", "global_scale")


def fits(method: Method, module: Module) -> bool:
    """Whether the file has the tensors that a method stores for a module, with their dtypes."""
    return all(
        any(module.dtypes.get(suffix) in CODINGS[stored.coding].dtypes for suffix in stored.suffixes(module.fused))
        for stored in FORMATS[method.stored]
        if stored.role in _NEEDED
    )
