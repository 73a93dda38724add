"""Reads and validates PEFT's adapter_config.json; its values are not trusted."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_fn.checkpoint.safetensors_files import read_json
from moe_fn.layer.lora import scaling_of

CONFIG = "adapter_config.json"
# Options that change the function from plain LoRA; false, null or empty in adapters of plain LoRA.
_OTHERS = (
    "use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config",
    "kasa_config",
    "velora_config", "monteclora_config", "megatron_config", "layer_replication",
)  # fmt: skip
# Values of init_lora_weights that leave the base weights unchanged; others (pissa, olora, corda, loftq, lora_ga)
# subtract from them.
_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")
_MOST_PATTERNS, _LONGEST_PATTERN, _MOST_REPEATS = 100_000, 300, 4
_PLAIN = re.compile(r"[\w.\\*+^$|-]*")  # without groups and braces repeats cannot nest, and matching is fast


@dataclass(frozen=True)
class AdapterConfig:
    """Ranks, scaling factors and target parameters of an adapter."""

    where: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    parameters: tuple[str, ...]
    version: str | None = None  # of the peft that wrote it

    def rank_of(self, module: str) -> int:
        """The rank of a module or a parameter, by its name in the model."""
        return int(_first_match(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """The factor of B A for a module, by its name in the model."""
        return scaling_of(
            float(_first_match(self.alpha_pattern, module, self.alpha)), self.rank_of(module), self.rank_stabilised
        )


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The config of an adapter folder. Raises ValueError for anything but plain LoRA, and for invalid values."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}; expected a folder that PEFT's save_pretrained wrote")
    where = str(folder / CONFIG)
    values = read_json(folder / CONFIG)
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {values.get('peft_type')!r:.80}; expected 'LORA'")
    for name in _OTHERS:
        if values.get(name):
            raise ValueError(f"{where}: {name} is {values[name]!r:.80}; expected none: only plain LoRA is supported")
    if values.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias is {values['bias']!r:.80}; expected 'none': adapters have no biases here")
    beginning = values.get("init_lora_weights", True)
    if not isinstance(beginning, bool | str) or beginning not in _BEGINNINGS:
        raise ValueError(
            f"{where}: init_lora_weights is {beginning!r:.80}, which changes the base weights; "
            f"expected one of {_BEGINNINGS}, or an adapter converted to plain LoRA (save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    stabilised = values.get("use_rslora", False)
    parameters = values.get("target_parameters") or []
    if type(stabilised) is not bool:
        raise ValueError(f"{where}: use_rslora is {stabilised!r:.80}; expected true or false")
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise ValueError(f"{where}: target_parameters is {parameters!r:.80}; expected names")
    return AdapterConfig(
        where=where,
        rank=_rank(where, "r", values.get("r")),
        alpha=_number(where, "lora_alpha", values.get("lora_alpha")),
        rank_pattern={k: _rank(where, "rank_pattern", v) for k, v in _pattern(where, "rank_pattern", values).items()},
        alpha_pattern={
            k: _number(where, "alpha_pattern", v) for k, v in _pattern(where, "alpha_pattern", values).items()
        },
        rank_stabilised=stabilised,
        parameters=tuple(parameters),
        version=_version(where, values.get("peft_version")),
    )


def _version(where: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: peft_version is {value!r:.80}; expected a version such as '0.21.2'")
    return value


def _rank(where: str, name: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{where}: {name} is {value!r:.80}; expected a rank, an int > 0")
    return value


def _number(where: str, name: str, value: Any) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{where}: {name} is {value!r:.80}; expected a number")
    return number


def _pattern(where: str, name: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """An object from patterns of names to values; every pattern compiles and is fast to match."""
    found = values.get(name) or {}
    if not isinstance(found, dict) or len(found) > _MOST_PATTERNS:
        raise ValueError(f"{where}: {name} is {found!r:.80}; expected an object from names of modules to values")
    for key in found:
        if not _is_quick(key):
            raise ValueError(
                f"{where}: {name} has the pattern {key!r:.120}; expected names, or patterns without groups and braces"
            )
    return found


def _is_quick(pattern: str) -> bool:
    repeats = pattern.count("*") + pattern.count("+")
    if len(pattern) > _LONGEST_PATTERN or repeats > _MOST_REPEATS or not _PLAIN.fullmatch(pattern):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _first_match(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the name or its end after a dot, as in PEFT; else the default."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
