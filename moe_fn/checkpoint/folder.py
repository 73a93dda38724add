"""Opens a checkpoint folder: config.json, model.safetensors or shards with an index, and the file of each tensor."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_fn.checkpoint.safetensors_files import TensorInfo, read_header, read_json

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
QUANT = "hf_quant_config.json"  # ModelOpt's
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Headers = Mapping[str, Mapping[str, TensorInfo]]  # tensors of a file


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder with its parsed JSON files.

    config          config.json, None without one
    file_of_tensor  the file that holds each tensor
    quant           hf_quant_config.json, None without one
    is_whole        False for one file of several
    """

    folder: Path
    config: Mapping[str, Any] | None
    file_of_tensor: Mapping[str, str]
    quant: Mapping[str, Any] | None = None
    is_whole: bool = True


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens the checkpoint at a path: a folder, or one .safetensors file. Reads the index, or the header of the only
    file.

    Raises ValueError for a path without safetensors, and for an index that is not JSON or names files outside the
    folder.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a checkpoint folder, or a .safetensors file")
    folder = path if path.is_dir() else path.parent
    config, quant = (read_json(folder / name) if (folder / name).is_file() else None for name in (CONFIG, QUANT))
    if path.is_dir() and (path / INDEX).exists():
        return Checkpoint(folder, config, _files_of_index(path / INDEX), quant)
    file = path if not path.is_dir() else _only_file(path)
    return Checkpoint(folder, config, dict.fromkeys(read_header(file), file.name), quant, not (folder / INDEX).exists())


def read_headers(checkpoint: Checkpoint, files: Iterable[str]) -> Headers:
    """The checked headers of these files of a checkpoint.

    Raises ValueError as read_header does, and if the index lists a tensor in a file that does not have it.
    """
    headers = {file: read_header(checkpoint.folder / file) for file in dict.fromkeys(files)}
    for name, file in checkpoint.file_of_tensor.items():
        if file in headers and name not in headers[file]:
            raise ValueError(
                f"{checkpoint.folder / INDEX} lists {name} in {file}, but the file does not have it; expected it there"
            )
    return headers


def tensors_below(checkpoint: Checkpoint, headers: Headers, beginnings: Iterable[str]) -> dict[str, TensorInfo]:
    """All tensors of these files whose names begin with one of `beginnings`.

    Raises ValueError for a tensor that the index does not list in its file: it would be loaded from another file, or
    not at all.
    """
    beginnings = tuple(beginnings)
    found = {}
    for file, tensors in headers.items():
        for name, tensor in tensors.items():
            if not name.startswith(beginnings):
                continue
            if checkpoint.file_of_tensor.get(name) != file:
                listed = checkpoint.file_of_tensor.get(name)
                there = "does not list it" if listed is None else f"lists it in {listed}"
                raise ValueError(
                    f"{checkpoint.folder / file} has {name}, but the index {there}; expected every tensor in one file"
                )
            found[name] = tensor
    return found


def full_name(prefix: str, name: str) -> str:
    """The name in the file of a tensor that is named relative to the prefix.

    >>> full_name("model.layers.3.moe", "../share_expert.up_proj.weight")
    'model.layers.3.share_expert.up_proj.weight'
    """
    while name.startswith("../"):
        prefix, name = prefix.rpartition(".")[0], name[3:]
    return f"{prefix}.{name}" if prefix else name


def model_types(config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Every model_type in a config.json, including those of nested configs."""
    if config is None:
        return ()
    own = (config["model_type"],) if isinstance(config.get("model_type"), str) else ()
    return own + tuple(name for value in config.values() if isinstance(value, Mapping) for name in model_types(value))


def quant_dict_of(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """The quantization settings of a checkpoint: quantization_config of config.json, or of a config nested in it, and
    ModelOpt's hf_quant_config.json.

    expert_dtype is also read from config.json outside quantization_config (DeepSeek-V4). If config.json says fp8 and
    ModelOpt's file exists, some modules of an fp8 model were requantized, and the two are merged.

    Raises ValueError if two of them contradict each other.
    """
    config = checkpoint.config or {}
    found = list(_quant_dicts(config))
    if checkpoint.quant is not None:
        quant_dict = checkpoint.quant.get("quantization")
        if not isinstance(quant_dict, Mapping):
            raise ValueError(f"{checkpoint.folder / QUANT}: quantization is {quant_dict!r:.80}; expected a JSON object")
        requantized = bool(found) and found[0].get("quant_method") == "fp8"
        found = (
            [{**quant_dict, **found[0]}, *found[1:]]
            if requantized
            else [*found, {"quant_method": "modelopt", **quant_dict}]
        )
    for quant_dict in found[1:]:
        for name in ("quant_method", "quant_algo"):
            if name in quant_dict and name in found[0] and quant_dict[name] != found[0][name]:
                raise ValueError(
                    f"{checkpoint.folder} has {name} {found[0][name]!r} and {quant_dict[name]!r}; expected one"
                )
    if not found:
        return None
    of_experts = [part["expert_dtype"] for part in (found[0], *_parts(config)) if part.get("expert_dtype") is not None]
    return {**found[0], **({"expert_dtype": of_experts[0]} if of_experts else {})}


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config and the configs nested in it."""
    return [config, *(value for value in config.values() if isinstance(value, Mapping))]


def _quant_dicts(config: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    for name in ("quantization_config", "compression_config"):
        quant_dict = config.get(name)
        if quant_dict is not None and not isinstance(quant_dict, Mapping):
            raise ValueError(f"{name} in config.json is {quant_dict!r:.80}; expected a JSON object")
        if quant_dict:
            yield (
                quant_dict
                if "quant_method" in quant_dict or name == "quantization_config"
                else {"quant_method": "compressed-tensors", **quant_dict}
            )
    for value in config.values():
        if isinstance(value, Mapping) and "model_type" in value:
            yield from _quant_dicts(value)


def dtype_of_floats(config: Mapping[str, Any] | None) -> torch.dtype:
    """The dtype that a model computes in, from its config.json; bfloat16 if there is none."""
    for part in _parts(config or {}):
        name = str(part.get("dtype", part.get("torch_dtype"))).removeprefix("torch.")
        if name in _DTYPES:
            return _DTYPES[name]
    return torch.bfloat16


def _only_file(folder: Path) -> Path:
    if (folder / SINGLE).exists():
        return folder / SINGLE
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        others = sorted(
            file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf") for file in folder.glob(pattern)
        )
        pickles = f" ({', '.join(others[:3])}: pickles are not read)" if others else ""
        found = ", ".join(file.name for file in files[:3]) or f"no .safetensors{pickles}"
        raise ValueError(f"{folder} has {found}; expected {SINGLE}, or shards with {INDEX}")
    return files[0]


def _files_of_index(path: Path) -> dict[str, str]:
    files = read_json(path).get("weight_map")
    if not isinstance(files, Mapping):
        raise ValueError(f"{path}: weight_map is {files!r:.60}; expected an object from tensor names to files")
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file or file in (".", "..") or "\\" in file or "\0" in file:
            raise ValueError(f"{path}: {name} is in {file!r:.120}; expected the name of a file in the same folder")
        if not file.endswith(".safetensors"):
            raise ValueError(f"{path}: {name} is in {file!r:.120}; expected a .safetensors file (pickles are not read)")
    return dict(files)
