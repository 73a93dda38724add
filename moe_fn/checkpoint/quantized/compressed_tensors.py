"""Converts a group of compressed-tensors' config_groups to a `QuantConfig` and a row of FORMATS."""

from collections.abc import Mapping
from typing import Any

from moe_fn.checkpoint.quantized.formats import Method, QuantDict
from moe_fn.config import ActivationQuantConfig, QuantConfig

# (type, bits, group size if it determines the scheme) -> scheme
_SCHEMES = {
    ("float", 8, None): "fp8_e4m3", ("float", 8, 32): "mxfp8", ("float", 4, 16): "nvfp4", ("float", 4, 32): "mxfp4",
    ("int", 8, None): "int8", ("int", 4, None): "int4",
}  # fmt: skip
_FORMATS = {
    ("float-quantized", "fp8_e4m3"): "ct fp8", ("naive-quantized", "fp8_e4m3"): "ct fp8",
    ("int-quantized", "int8"): "ct int8",
    ("int-quantized", "int4"): "ct int4", ("naive-quantized", "int4"): "ct int4",
    ("naive-quantized", "int8"): "ct int8", ("pack-quantized", "int4"): "ct int4, packed",
    ("pack-quantized", "int8"): "ct int8, packed",
    ("nvfp4-pack-quantized", "nvfp4"): "ct nvfp4", ("mxfp4-pack-quantized", "mxfp4"): "ct mxfp4",
    ("mxfp8-quantized", "mxfp8"): "ct mxfp8",
}  # fmt: skip


def method_of_group(quant_dict: QuantDict, group: Mapping[str, Any]) -> Method:
    """The method of a group. Raises ValueError for schemes and formats that are not supported."""
    weights, inputs, layout = (
        group.get("weights"),
        group.get("input_activations"),
        str(group.get("format") or quant_dict.get("format")),
    )
    if not isinstance(weights, Mapping) or group.get("output_activations"):
        raise _refuse(group, "weights, and no output_activations")
    if str(weights.get("actorder") or None) in ("group", "dynamic", "True"):
        raise _refuse(weights, "no actorder that permutes inputs")
    scheme, symmetric = _scheme(weights), weights.get("symmetric", True)
    stored = _FORMATS.get((layout, scheme))
    if stored is None:
        raise ValueError(
            f"quantization_config.format is {layout!r} for {scheme}; expected one of {sorted({f for f, _ in _FORMATS})}"
        )
    quant = QuantConfig(
        scheme=scheme,
        zero_points=not symmetric,
        activations=None if inputs is None else _activations(inputs),
        **_tiles(weights),
    )
    return Method(quant, stored if symmetric else f"{stored}, zeros")


def _refuse(settings: Any, expected: str) -> Exception:
    return ValueError(f"quantization_config.config_groups has {dict(settings)!r:.300}; expected {expected}")


def _scheme(settings: Mapping[str, Any]) -> Any:
    """The scheme of weights, or of activations."""
    kind, bits, size = str(settings.get("type", "int")).lower(), settings.get("num_bits", 8), settings.get("group_size")
    bytes_of_scale = "uint8" in str(settings.get("scale_dtype")) or "e8m0" in str(settings.get("scale_dtype"))
    group_size = size if kind == "float" and (bits == 4 or bytes_of_scale) else None
    if (kind, bits, group_size) not in _SCHEMES:
        raise _refuse(settings, "float 8, float 4 in groups of 16 or 32, int 8 or int 4")
    return _SCHEMES[kind, bits, group_size]


def _strategy(settings: Mapping[str, Any]) -> str:
    """The strategy, inferred as in compressed-tensors if it is not given."""
    size = settings.get("group_size")
    return str(settings.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group"))


def _tiles(weights: Mapping[str, Any]) -> dict[str, Any]:
    strategy, block = _strategy(weights), weights.get("block_structure")
    if weights.get("dynamic"):
        raise _refuse(weights, "weights that are not dynamic")
    if strategy in ("group", "tensor_group"):
        return {"granularity": "group", "group_size": weights.get("group_size")}
    if strategy == "block":
        block = [int(size) for size in block.split("x")] if isinstance(block, str) else block
        return {"granularity": "block", "block_shape": tuple(block or ())}
    return {"granularity": strategy}


def _activations(inputs: Mapping[str, Any]) -> ActivationQuantConfig:
    strategy, dynamic = _strategy(inputs), inputs.get("dynamic", False)
    if not inputs.get("symmetric", True):
        raise _refuse(inputs, "inputs without zero points")
    if strategy in ("group", "tensor_group"):
        # dynamic "local": the global scale is static and loaded
        static = dynamic is not True and strategy == "tensor_group"
        return ActivationQuantConfig(
            scheme=_scheme(inputs), granularity="group", group_size=inputs.get("group_size"), static=static
        )
    return ActivationQuantConfig(scheme=_scheme(inputs), granularity=strategy, static=not dynamic)  # type: ignore[arg-type]
