"""quantization_config to a QuantConfig and a row of FORMATS: what each published method says, and in which words."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from moe_fn.checkpoint.compressed import method_of_group
from moe_fn.checkpoint.matching import is_listed, is_target, matches_from_start
from moe_fn.checkpoint.stored import Method, Words
from moe_fn.config import ActivationQuantConfig, QuantConfig


def method_of(words: Words, module: str, of_experts: bool) -> Method | None:
    """The method of a linear module, by its name in the checkpoint; None where its weight is as it was.

    Raises ValueError for a method that is not known, and for words that contradict one another.
    """
    method = str(words.get("quant_method", "modelopt" if "quant_algo" in words else None))
    if method not in _READERS:
        raise ValueError(f"quantization_config.quant_method is {method!r}; expected one of {', '.join(map(repr, _READERS))}")
    try:
        return _method_of(words, method, module, of_experts)
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(
            f"quantization_config has a value of another kind than {method!r} has ({error}); expected what its tools write"
        ) from error


def _method_of(words: Words, method: str, module: str, of_experts: bool) -> Method | None:
    lists = (words.get(name) for name in ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules"))
    if any(is_listed(module, _strings(names)) for names in lists if names):
        return None
    return _READERS[method](words, module, of_experts)


def _strings(names: Any) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"a list of modules in quantization_config is {names!r:.80}; expected names")
    return names


def _refuse(name: str, value: Any, expected: str) -> Exception:
    return ValueError(f"quantization_config.{name} is {value!r:.200}; expected {expected}")


def _tiles(size: Any) -> dict[str, Any]:
    """group_size, where -1 is an output's whole row."""
    if type(size) is not int or size < -1 or size == 0:
        raise _refuse("group_size", size, "a positive number of inputs, or -1")
    return {"granularity": "channel"} if size == -1 else {"granularity": "group", "group_size": size}


_TOKEN = ActivationQuantConfig(scheme="fp8_e4m3", granularity="token")
_MXFP4 = QuantConfig(scheme="mxfp4", granularity="group", group_size=32)
_MXFP8_INPUTS = ActivationQuantConfig(scheme="mxfp8", granularity="group", group_size=32)
_MXFP8 = QuantConfig(scheme="mxfp8", granularity="group", group_size=32, activations=_MXFP8_INPUTS)
_NVFP4_INPUTS = ActivationQuantConfig(scheme="nvfp4", granularity="group", group_size=16, static=True)


def _nvfp4(inputs: ActivationQuantConfig | None) -> QuantConfig:
    return QuantConfig(scheme="nvfp4", granularity="group", group_size=16, activations=inputs)


def _fp8(words: Words, module: str, of_experts: bool) -> Method:
    """DeepSeek's: blocks, scales that multiply; without blocks one scale a matrix (AutoFP8)."""
    if of_experts and words.get("expert_dtype", "fp8") == "fp4":
        return Method(_MXFP4, "fp4")
    block, inputs = words.get("weight_block_size"), words.get("activation_scheme", "dynamic")
    if inputs not in ("dynamic", "static"):
        raise _refuse("activation_scheme", inputs, "'dynamic' or 'static'")
    if block is None:
        of_inputs = ActivationQuantConfig(scheme="fp8_e4m3", granularity="tensor", static=inputs == "static")
        return Method(QuantConfig(scheme="fp8_e4m3", granularity="tensor", activations=of_inputs), "fp8")
    if not isinstance(block, list) or len(block) != 2 or inputs == "static":
        raise _refuse("weight_block_size", block, "two numbers, with activation_scheme 'dynamic'")
    if block == [1, 32]:
        return Method(_MXFP8, "mxfp8")
    power = words.get("scale_fmt", "float") == "ue8m0"
    of_inputs = ActivationQuantConfig(scheme="fp8_e4m3", granularity="group", group_size=block[1], power_of_two_scales=power)
    return Method(QuantConfig(scheme="fp8_e4m3", granularity="block", block_shape=tuple(block), activations=of_inputs), "fp8")


def _gptq(words: Words, module: str, of_experts: bool) -> Method | None:
    for pattern, changes in (words.get("dynamic") or {}).items():  # GPTQModel: what is different for some modules
        if matches_from_start(pattern.removeprefix("+:").removeprefix("-:"), module):
            if pattern.startswith("-:") or changes is False:
                return None
            words = {**words, **changes}
            break
    if words.get("desc_act"):
        raise _refuse("desc_act", words["desc_act"], "False, for experts whose inputs change places (act-order) are not read")
    bits, symmetric, version = words.get("bits"), words.get("sym", True), words.get("checkpoint_format", "gptq")
    versions = {"gptq": "", "gptq_v2": " v2"}
    if bits not in (4, 8) or version not in versions or not isinstance(symmetric, bool):
        raise _refuse("bits, checkpoint_format, sym", (bits, version, symmetric), "4 or 8, 'gptq' or 'gptq_v2', and a bool")
    quant = QuantConfig(scheme="int4" if bits == 4 else "int8", zero_points=not symmetric, **_tiles(words.get("group_size", 128)))
    return Method(quant, f"gptq{versions[version]} {bits} bits{', symmetric' if symmetric else ''}")


def _awq(words: Words, module: str, of_experts: bool) -> Method:
    bits, version = words.get("bits", words.get("w_bit")), str(words.get("version", "gemm")).lower()
    zeros = words.get("zero_point", True)
    if bits != 4 or version != "gemm" or not isinstance(zeros, bool):
        raise _refuse("bits, version, zero_point", (bits, version, zeros), "4, 'gemm' and a bool")
    quant = QuantConfig(scheme="int4", zero_points=zeros, **_tiles(words.get("group_size", words.get("q_group_size", 128))))
    return Method(quant, "awq" if zeros else "awq, symmetric")


_MODELOPT: dict[str, Method] = {
    "FP8": Method(
        QuantConfig(
            scheme="fp8_e4m3", granularity="tensor",
            activations=ActivationQuantConfig(scheme="fp8_e4m3", granularity="tensor", static=True),
        ),
        "modelopt fp8",
    ),
    "FP8_PER_CHANNEL_PER_TOKEN": Method(
        QuantConfig(scheme="fp8_e4m3", granularity="channel", activations=_TOKEN), "modelopt fp8"
    ),
    "NVFP4": Method(_nvfp4(_NVFP4_INPUTS), "modelopt nvfp4"),
    "W4A16_NVFP4": Method(_nvfp4(None), "modelopt nvfp4"),
    "MXFP8": Method(_MXFP8, "modelopt mxfp8"),
}  # fmt: skip


def _modelopt(words: Words, module: str, of_experts: bool) -> Method | None:
    if words.get("quant_algo") == "MIXED_PRECISION":
        layers = words.get("quantized_layers")
        if not isinstance(layers, Mapping) or not all(isinstance(layer, Mapping) for layer in layers.values()):
            raise _refuse("quantized_layers", layers, "an algorithm for each layer, with MIXED_PRECISION")
        names = itertools.accumulate(module.split("."), "{}.{}".format)
        found = [layers[name] for name in names if name in layers]
        return _modelopt({"quant_algo": None, **found[-1]}, module, of_experts) if found else None
    algorithm = words.get("quant_algo")
    if algorithm not in _MODELOPT:
        raise _refuse("quant_algo", algorithm, f"one of {', '.join(_MODELOPT)}")
    method, size = _MODELOPT[algorithm], words.get("group_size")
    if size not in (None, 0, method.quant.group_size):
        raise _refuse("group_size", size, f"{method.quant.group_size}, which {algorithm} fixes")
    return method


def _compressed_tensors(words: Words, module: str, of_experts: bool) -> Method | None:
    if words.get("transform_config") or (words.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _refuse("transform_config or sparsity_config", "given", "neither transforms nor sparsity")
    groups = words.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise _refuse("config_groups", groups, "groups with targets, by name")
    found = [group for group in groups.values() if is_target(module, _strings(group.get("targets")))]
    by_name = [group for group in found if not is_target("", group["targets"])]  # a name says more than a class
    return method_of_group(words, (by_name or found)[0]) if found else None


_READERS: dict[str, Callable[[Words, str, bool], Method | None]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "mxfp8": lambda words, *a: Method(_MXFP8, "mxfp8"),
    "mxfp4": lambda words, *a: Method(_MXFP4, "mxfp4 blocks"),
    "gptq": _gptq,
    "awq": _awq,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
}
