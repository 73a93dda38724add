"""Converts ModelOpt's settings to a `QuantConfig` and a row of FORMATS: one algorithm for a model, or one per
module.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from moe_fn.checkpoint.quantized.formats import MXFP8, Method, Module, QuantDict
from moe_fn.config import ActivationQuantConfig, QuantConfig

_NVFP4_INPUTS = ActivationQuantConfig(scheme="nvfp4", granularity="group", group_size=16, static=True)
_TENSOR = ActivationQuantConfig(scheme="fp8_e4m3", granularity="tensor", static=True)
_TOKEN = ActivationQuantConfig(scheme="fp8_e4m3", granularity="token")
_ALGORITHMS: dict[str, Method] = {
    "FP8": Method(QuantConfig(scheme="fp8_e4m3", granularity="tensor", activations=_TENSOR), "modelopt fp8"),
    "FP8_PER_CHANNEL_PER_TOKEN": Method(
        QuantConfig(scheme="fp8_e4m3", granularity="channel", activations=_TOKEN), "modelopt fp8"
    ),
    "NVFP4": Method(
        QuantConfig(scheme="nvfp4", granularity="group", group_size=16, activations=_NVFP4_INPUTS), "modelopt nvfp4"
    ),
    "W4A16_NVFP4": Method(QuantConfig(scheme="nvfp4", granularity="group", group_size=16), "modelopt nvfp4"),
    "MXFP8": Method(MXFP8, "modelopt mxfp8"),
}
_MIXED = "MIXED_PRECISION"


def modelopt(quant_dict: QuantDict, module: Module) -> Method | None:
    """The method of a module; None without an algorithm for it, for example if only the KV cache is quantized."""
    algorithm, layers = quant_dict.get("quant_algo"), quant_dict.get("quantized_layers")
    of_experts = algorithm_of_experts(quant_dict)
    if algorithm is None or str(algorithm).upper() != _MIXED:
        algorithm = of_experts if module.of_experts and of_experts is not None else algorithm
        return None if algorithm is None else _method(algorithm, quant_dict.get("group_size"))
    if not layers and of_experts is not None:
        return _method(of_experts, quant_dict.get("group_size")) if module.of_experts else None
    if not isinstance(layers, Mapping) or not all(isinstance(layer, Mapping) for layer in layers.values()):
        raise _refuse("quantized_layers", layers, f"an algorithm for each layer, with {_MIXED}")
    found = [layers[name] for name in _names(module.name) if name in layers]
    return _method(found[-1].get("quant_algo"), found[-1].get("group_size")) if found else None


def algorithm_of_experts(quant_dict: QuantDict) -> Any:
    """The algorithm for experts only, which NVFP4 releases of fp8 models have."""
    return quant_dict.get("moe_quant_algo") or None


def _method(algorithm: Any, size: Any) -> Method:
    method = _ALGORITHMS.get(str(algorithm).upper())
    if method is None:
        raise _refuse("quant_algo", algorithm, f"one of {', '.join(_ALGORITHMS)}")
    if size not in (None, 0, method.quant.group_size):
        raise _refuse("group_size", size, f"{method.quant.group_size}, the group size of {algorithm}")
    return method


def _names(module: str) -> list[str]:
    """The names of a module and of the modules that contain it, outermost first; for a language model in a larger
    model, under both of its prefixes.
    """
    new, old = "model.language_model.", "language_model.model."
    other = module.replace(new, old, 1) if module.startswith(new) else module.replace(old, new, 1)
    both = zip(*(itertools.accumulate(name.split("."), "{}.{}".format) for name in (other, module)), strict=True)
    return list(itertools.chain.from_iterable(both))


def _refuse(name: str, value: Any, expected: str) -> Exception:
    return ValueError(f"quantization_config.{name} is {value!r:.200}; expected {expected}")
