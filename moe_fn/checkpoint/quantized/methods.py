"""Converts quantization_config of published methods to a `QuantConfig` and a row of FORMATS."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_fn.checkpoint.module_patterns import (
    AUTOAWQ,
    COMPRESSED_TENSORS,
    MODELOPT,
    TRANSFORMERS,
    ListRule,
    is_listed,
    matches_from_start,
    target_of,
)
from moe_fn.checkpoint.quantized.compressed_tensors import method_of_group
from moe_fn.checkpoint.quantized.formats import MXFP4, MXFP8, Method, Module, QuantDict, fits
from moe_fn.checkpoint.quantized.modelopt import algorithm_of_experts, modelopt
from moe_fn.config import ActivationQuantConfig, QuantConfig


@dataclass(frozen=True)
class Reader:
    """Reader of a method's quantization_config for a module, and the rule of its list of excluded modules, if any."""

    read: Callable[[QuantDict, Module], Method | None]
    lists: ListRule | None = None


def method_of(
    quant_dict: QuantDict, name: str, of_experts: bool, *, fused: bool = False, dtypes: Mapping[str, str] | None = None
) -> Method | None:
    """The method of a module; None if its weight is not quantized.

    name        of a linear module in the checkpoint, or of a tensor of all experts (`fused`)
    of_experts  whether it is a routed expert's
    dtypes      of its tensors in the file, by the suffixes of their names; None: not known

    The dtypes in the file decide between floats and codes, before the lists of modules: tools exclude more modules than
    they list, and readers of a list interpret it differently.

    Raises ValueError for an unknown method, for settings that contradict each other, and for codes in the file that
    quantization_config excludes.

    Laws
        Tensors stored as floats are floats whatever quantization_config says.
    """
    module = Module(name, of_experts, fused, dtypes or {})
    method = str(quant_dict.get("quant_method", "modelopt" if "quant_algo" in quant_dict else None))
    if method not in _READERS:
        raise ValueError(
            f"quantization_config.quant_method is {method!r}; expected one of {', '.join(map(repr, _READERS))}"
        )
    if module.floats:
        return None
    try:
        found = _method_of(quant_dict, _READERS[method], module)
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(
            f"quantization_config has a value of the wrong type for {method!r} ({error}); expected what its tools write"
        ) from error
    if found is None and module.codes is not None:
        raise ValueError(
            f"{module.name}{module.codes} is {module.dtypes[module.codes]}, but quantization_config excludes that "
            "module; expected floats"
        )
    return found


def _method_of(quant_dict: QuantDict, reader: Reader, module: Module) -> Method | None:
    listed = reader.lists is not None and is_listed(module.name, _listed(quant_dict, reader.lists), reader.lists)
    if listed and module.codes is None:
        return None
    found = reader.read(quant_dict, module)
    return None if found is None or (listed and not fits(found, module)) else found


def _listed(quant_dict: QuantDict, rule: ListRule) -> list[str]:
    return [name for key in rule.keys for name in _strings(quant_dict.get(key) or [])]


def _strings(names: Any) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"a list of modules in quantization_config is {names!r:.80}; expected names")
    return names


def _refuse(name: str, value: Any, expected: str) -> Exception:
    return ValueError(f"quantization_config.{name} is {value!r:.200}; expected {expected}")


def _tiles(size: Any) -> dict[str, Any]:
    """Granularity from group_size, where -1 is one scale per output."""
    if type(size) is not int or size < -1 or size == 0:
        raise _refuse("group_size", size, "a positive number of inputs, or -1")
    return {"granularity": "channel"} if size == -1 else {"granularity": "group", "group_size": size}


def _fp8(quant_dict: QuantDict, module: Module) -> Method:
    """The method of DeepSeek's fp8 checkpoints, whose experts may be fp4 or requantized by ModelOpt: the first that
    matches the file's tensors.
    """
    eight, four, dtype = _fp8_itself(quant_dict), Method(MXFP4, "fp4"), quant_dict.get("expert_dtype")
    if dtype not in (None, "fp8", "fp4"):
        raise _refuse("expert_dtype", dtype, "'fp8' or 'fp4'")
    own = [eight] if not module.of_experts else [four, eight] if dtype == "fp4" else [eight, four]
    requantized, of_experts = (
        modelopt(quant_dict, module),
        modelopt({"moe_quant_algo": algorithm_of_experts(quant_dict)}, module),
    )
    left_out = is_listed(module.name, _listed(quant_dict, MODELOPT), MODELOPT)  # by ModelOpt alone
    candidates = [method for method in (*own, requantized, of_experts) if method is not None]
    if requantized is not None and not left_out:
        candidates.insert(0, requantized)
    return next((method for method in candidates if fits(method, module)), candidates[0])


def _fp8_itself(quant_dict: QuantDict) -> Method:
    """fp8 with one scale per block, or without blocks one scale per matrix (AutoFP8)."""
    block, inputs = quant_dict.get("weight_block_size"), quant_dict.get("activation_scheme", "dynamic")
    if inputs not in ("dynamic", "static"):
        raise _refuse("activation_scheme", inputs, "'dynamic' or 'static'")
    if block is None:
        of_inputs = ActivationQuantConfig(scheme="fp8_e4m3", granularity="tensor", static=inputs == "static")
        return Method(QuantConfig(scheme="fp8_e4m3", granularity="tensor", activations=of_inputs), "fp8")
    if not isinstance(block, list) or len(block) != 2 or inputs == "static":
        raise _refuse("weight_block_size", block, "two numbers, with activation_scheme 'dynamic'")
    if block == [1, 32]:
        return Method(MXFP8, "mxfp8")
    power = quant_dict.get("scale_fmt", "float") == "ue8m0"
    of_inputs = ActivationQuantConfig(
        scheme="fp8_e4m3", granularity="group", group_size=block[1], power_of_two_scales=power
    )
    return Method(
        QuantConfig(scheme="fp8_e4m3", granularity="block", block_shape=tuple(block), activations=of_inputs), "fp8"
    )


def _gptq(quant_dict: QuantDict, module: Module) -> Method | None:
    blocks = (
        quant_dict.get("modules_in_block_to_quantize") or []
    )  # of optimum: names, or lists of names, within a block
    inside = [name for part in blocks for name in _strings(part if isinstance(part, list) else [part])]
    if inside and not any(name in module.name for name in inside):
        return None
    for pattern, changes in (quant_dict.get("dynamic") or {}).items():  # GPTQModel: what is different for some modules
        if matches_from_start(pattern.removeprefix("+:").removeprefix("-:"), module.name):
            if pattern.startswith("-:") or changes is False:
                return None
            quant_dict = {**quant_dict, **changes}
            break
    if quant_dict.get("desc_act"):
        raise _refuse(
            "desc_act", quant_dict["desc_act"], "False, because experts with permuted inputs (act-order) are not read"
        )
    bits, symmetric, version = (
        quant_dict.get("bits"),
        quant_dict.get("sym", True),
        quant_dict.get("checkpoint_format", "gptq"),
    )
    versions = {"gptq": "", "gptq_v2": " v2"}
    if bits not in (4, 8) or version not in versions or not isinstance(symmetric, bool):
        raise _refuse(
            "bits, checkpoint_format, sym", (bits, version, symmetric), "4 or 8, 'gptq' or 'gptq_v2', and a bool"
        )
    quant = QuantConfig(
        scheme="int4" if bits == 4 else "int8", zero_points=not symmetric, **_tiles(quant_dict.get("group_size", 128))
    )
    return Method(quant, f"gptq{versions[version]} {bits} bits{', symmetric' if symmetric else ''}")


def _awq(quant_dict: QuantDict, module: Module) -> Method:
    bits, version = quant_dict.get("bits", quant_dict.get("w_bit")), str(quant_dict.get("version", "gemm")).lower()
    zeros = quant_dict.get("zero_point", True)
    if bits != 4 or version != "gemm" or not isinstance(zeros, bool):
        raise _refuse("bits, version, zero_point", (bits, version, zeros), "4, 'gemm' and a bool")
    quant = QuantConfig(
        scheme="int4", zero_points=zeros, **_tiles(quant_dict.get("group_size", quant_dict.get("q_group_size", 128)))
    )
    return Method(quant, "awq" if zeros else "awq, symmetric")


def _compressed_tensors(quant_dict: QuantDict, module: Module) -> Method | None:
    if (
        quant_dict.get("transform_config")
        or (quant_dict.get("sparsity_config") or {}).get("format", "dense") != "dense"
    ):
        raise _refuse("transform_config or sparsity_config", "given", "neither transforms nor sparsity")
    groups = quant_dict.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise _refuse("config_groups", groups, "groups with targets, by name")
    group_of_target = {target: group for group in groups.values() for target in _strings(group.get("targets"))}
    target = target_of(module.name, group_of_target)
    return None if target is None else method_of_group(quant_dict, group_of_target[target])


_READERS: dict[str, Reader] = {
    "compressed-tensors": Reader(_compressed_tensors, COMPRESSED_TENSORS),
    "fp8": Reader(_fp8, TRANSFORMERS),
    "mxfp8": Reader(lambda quant_dict, module: Method(MXFP8, "mxfp8"), TRANSFORMERS),
    "mxfp4": Reader(lambda quant_dict, module: Method(MXFP4, "mxfp4 blocks"), TRANSFORMERS),
    "gptq": Reader(_gptq),
    "awq": Reader(_awq, AUTOAWQ),
    "modelopt": Reader(modelopt, MODELOPT),
    "modelopt_fp4": Reader(modelopt, MODELOPT),
}
