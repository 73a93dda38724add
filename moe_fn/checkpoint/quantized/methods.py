"""quantization_config to a QuantConfig and a row of FORMATS: what each published method says, and in which words."""

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
from moe_fn.checkpoint.quantized.formats import MXFP4, MXFP8, Method, Module, Words, fits
from moe_fn.checkpoint.quantized.modelopt import algorithm_of_experts, modelopt
from moe_fn.config import ActivationQuantConfig, QuantConfig


@dataclass(frozen=True)
class Reader:
    """What a method's words say of a module that its list, if it has one, does not leave out."""

    read: Callable[[Words, Module], Method | None]
    lists: ListRule | None = None


def method_of(
    words: Words, name: str, of_experts: bool, *, fused: bool = False, dtypes: Mapping[str, str] | None = None
) -> Method | None:
    """The method of a module; None where its weight is as it was.

    name        of a linear module in the checkpoint, or of a tensor of all experts: those are `fused`
    of_experts  whether it is a routed expert's
    dtypes      of its tensors in the file, by what their names have behind its own; None: not known

    Where the file is known, its tensors say whether they are floats or codes, whatever lists of modules say: tools
    leave out more than they list, and those that read a list do not agree on what it has.

    Raises ValueError for a method that is not known, for words that contradict one another, and for codes in the file
    where the words say that nothing is quantized.

    Laws
        What a file has as floats is floats whatever the words say.
    """
    module = Module(name, of_experts, fused, dtypes or {})
    method = str(words.get("quant_method", "modelopt" if "quant_algo" in words else None))
    if method not in _READERS:
        raise ValueError(
            f"quantization_config.quant_method is {method!r}; expected one of {', '.join(map(repr, _READERS))}"
        )
    if module.floats:
        return None
    try:
        found = _method_of(words, _READERS[method], module)
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(
            f"quantization_config has a value of another kind than {method!r} has ({error}); "
            "expected what its tools write"
        ) from error
    if found is None and module.codes is not None:
        raise ValueError(
            f"{module.name}{module.codes} is {module.dtypes[module.codes]}, but quantization_config leaves that module "
            "out; expected floats"
        )
    return found


def _method_of(words: Words, reader: Reader, module: Module) -> Method | None:
    listed = reader.lists is not None and is_listed(module.name, _listed(words, reader.lists), reader.lists)
    if listed and module.codes is None:
        return None
    found = reader.read(words, module)
    return None if found is None or (listed and not fits(found, module)) else found


def _listed(words: Words, rule: ListRule) -> list[str]:
    return [name for key in rule.keys for name in _strings(words.get(key) or [])]


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


def _fp8(words: Words, module: Module) -> Method:
    """DeepSeek's; its experts may be fp4, or what ModelOpt made of them: of what the words say, the first that the file
    has.
    """
    eight, four, dtype = _fp8_itself(words), Method(MXFP4, "fp4"), words.get("expert_dtype")
    if dtype not in (None, "fp8", "fp4"):
        raise _refuse("expert_dtype", dtype, "'fp8' or 'fp4'")
    own = [eight] if not module.of_experts else [four, eight] if dtype == "fp4" else [eight, four]
    anew, of_experts = modelopt(words, module), modelopt({"moe_quant_algo": algorithm_of_experts(words)}, module)
    left_out = is_listed(module.name, _listed(words, MODELOPT), MODELOPT)  # by ModelOpt alone
    said = [method for method in (*own, anew, of_experts) if method is not None]
    if anew is not None and not left_out:
        said.insert(0, anew)
    return next((method for method in said if fits(method, module)), said[0])


def _fp8_itself(words: Words) -> Method:
    """Blocks, scales that multiply; without blocks one scale a matrix (AutoFP8)."""
    block, inputs = words.get("weight_block_size"), words.get("activation_scheme", "dynamic")
    if inputs not in ("dynamic", "static"):
        raise _refuse("activation_scheme", inputs, "'dynamic' or 'static'")
    if block is None:
        of_inputs = ActivationQuantConfig(scheme="fp8_e4m3", granularity="tensor", static=inputs == "static")
        return Method(QuantConfig(scheme="fp8_e4m3", granularity="tensor", activations=of_inputs), "fp8")
    if not isinstance(block, list) or len(block) != 2 or inputs == "static":
        raise _refuse("weight_block_size", block, "two numbers, with activation_scheme 'dynamic'")
    if block == [1, 32]:
        return Method(MXFP8, "mxfp8")
    power = words.get("scale_fmt", "float") == "ue8m0"
    of_inputs = ActivationQuantConfig(
        scheme="fp8_e4m3", granularity="group", group_size=block[1], power_of_two_scales=power
    )
    return Method(
        QuantConfig(scheme="fp8_e4m3", granularity="block", block_shape=tuple(block), activations=of_inputs), "fp8"
    )


def _gptq(words: Words, module: Module) -> Method | None:
    blocks = words.get("modules_in_block_to_quantize") or []  # optimum's: names, or lists of names, within a block
    inside = [name for part in blocks for name in _strings(part if isinstance(part, list) else [part])]
    if inside and not any(name in module.name for name in inside):
        return None
    for pattern, changes in (words.get("dynamic") or {}).items():  # GPTQModel: what is different for some modules
        if matches_from_start(pattern.removeprefix("+:").removeprefix("-:"), module.name):
            if pattern.startswith("-:") or changes is False:
                return None
            words = {**words, **changes}
            break
    if words.get("desc_act"):
        raise _refuse(
            "desc_act", words["desc_act"], "False, for experts whose inputs change places (act-order) are not read"
        )
    bits, symmetric, version = words.get("bits"), words.get("sym", True), words.get("checkpoint_format", "gptq")
    versions = {"gptq": "", "gptq_v2": " v2"}
    if bits not in (4, 8) or version not in versions or not isinstance(symmetric, bool):
        raise _refuse(
            "bits, checkpoint_format, sym", (bits, version, symmetric), "4 or 8, 'gptq' or 'gptq_v2', and a bool"
        )
    quant = QuantConfig(
        scheme="int4" if bits == 4 else "int8", zero_points=not symmetric, **_tiles(words.get("group_size", 128))
    )
    return Method(quant, f"gptq{versions[version]} {bits} bits{', symmetric' if symmetric else ''}")


def _awq(words: Words, module: Module) -> Method:
    bits, version = words.get("bits", words.get("w_bit")), str(words.get("version", "gemm")).lower()
    zeros = words.get("zero_point", True)
    if bits != 4 or version != "gemm" or not isinstance(zeros, bool):
        raise _refuse("bits, version, zero_point", (bits, version, zeros), "4, 'gemm' and a bool")
    quant = QuantConfig(
        scheme="int4", zero_points=zeros, **_tiles(words.get("group_size", words.get("q_group_size", 128)))
    )
    return Method(quant, "awq" if zeros else "awq, symmetric")


def _compressed_tensors(words: Words, module: Module) -> Method | None:
    if words.get("transform_config") or (words.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _refuse("transform_config or sparsity_config", "given", "neither transforms nor sparsity")
    groups = words.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise _refuse("config_groups", groups, "groups with targets, by name")
    group_of_target = {target: group for group in groups.values() for target in _strings(group.get("targets"))}
    target = target_of(module.name, group_of_target)
    return None if target is None else method_of_group(words, group_of_target[target])


_READERS: dict[str, Reader] = {
    "compressed-tensors": Reader(_compressed_tensors, COMPRESSED_TENSORS),
    "fp8": Reader(_fp8, TRANSFORMERS),
    "mxfp8": Reader(lambda words, module: Method(MXFP8, "mxfp8"), TRANSFORMERS),
    "mxfp4": Reader(lambda words, module: Method(MXFP4, "mxfp4 blocks"), TRANSFORMERS),
    "gptq": Reader(_gptq),
    "awq": Reader(_awq, AUTOAWQ),
    "modelopt": Reader(modelopt, MODELOPT),
    "modelopt_fp4": Reader(modelopt, MODELOPT),
}
