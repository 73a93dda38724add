"""A checkpoint folder: config.json, model.safetensors or shards with an index, and which tensor is in which file."""

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
    """folder, the parsed config.json if there is one, the file of every tensor, and the parsed hf_quant_config.json if
    there is one.
    """

    folder: Path
    config: Mapping[str, Any] | None
    file_of_tensor: Mapping[str, str]
    quant: Mapping[str, Any] | None = None
    is_whole: bool = True  # not one file of several


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at a path: a folder, or one .safetensors file. Reads the index, or the header of the only file.

    Raises ValueError for a path without safetensors, and for an index that is no JSON or names files outside of the
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
    """The headers of some files of a checkpoint, all of them checked.

    Raises ValueError as read_header does, and where the index says that a file has a tensor which it has not.
    """
    headers = {file: read_header(checkpoint.folder / file) for file in dict.fromkeys(files)}
    for name, file in checkpoint.file_of_tensor.items():
        if file in headers and name not in headers[file]:
            raise ValueError(
                f"{checkpoint.folder / INDEX} says that {name} is in {file}; expected it there, but the file does not "
                "have it"
            )
    return headers


def tensors_below(checkpoint: Checkpoint, headers: Headers, beginnings: Iterable[str]) -> dict[str, TensorInfo]:
    """All tensors of these files whose names begin so.

    Raises ValueError for one that a file has and the index does not list there: it would be loaded from somewhere else,
    or not at all.
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
                    f"{checkpoint.folder / file} has {name}, but the index {there}; expected every tensor in one place"
                )
            found[name] = tensor
    return found


def full_name(prefix: str, name: str) -> str:
    """A name in the file, from one below the prefix.

    >>> full_name("model.layers.3.moe", "../share_expert.up_proj.weight")
    'model.layers.3.share_expert.up_proj.weight'
    """
    while name.startswith("../"):
        prefix, name = prefix.rpartition(".")[0], name[3:]
    return f"{prefix}.{name}" if prefix else name


def model_types(config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Every model_type in a config.json, those of nested configs too."""
    if config is None:
        return ()
    own = (config["model_type"],) if isinstance(config.get("model_type"), str) else ()
    return own + tuple(name for value in config.values() if isinstance(value, Mapping) for name in model_types(value))


def quant_words(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """What the checkpoint says of its quantization: quantization_config in config.json, or in a config nested there,
    and ModelOpt's file.

    An expert_dtype that config.json has outside of it counts (DeepSeek-V4). Where config.json says fp8 and ModelOpt's
    file is there, some modules of an fp8 model were quantized anew: the words are those of both.

    Raises ValueError where two of them contradict one another.
    """
    config = checkpoint.config or {}
    found = list(_quant_words(config))
    if checkpoint.quant is not None:
        words = checkpoint.quant.get("quantization")
        if not isinstance(words, Mapping):
            raise ValueError(f"{checkpoint.folder / QUANT}: quantization is {words!r:.80}; expected a JSON object")
        anew = bool(found) and found[0].get("quant_method") == "fp8"
        found = [{**words, **found[0]}, *found[1:]] if anew else [*found, {"quant_method": "modelopt", **words}]
    for words in found[1:]:
        for name in ("quant_method", "quant_algo"):
            if name in words and name in found[0] and words[name] != found[0][name]:
                raise ValueError(
                    f"{checkpoint.folder} says {name} {found[0][name]!r} and {words[name]!r}; expected one"
                )
    if not found:
        return None
    of_experts = [part["expert_dtype"] for part in (found[0], *_parts(config)) if part.get("expert_dtype") is not None]
    return {**found[0], **({"expert_dtype": of_experts[0]} if of_experts else {})}


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config and those nested in it."""
    return [config, *(value for value in config.values() if isinstance(value, Mapping))]


def _quant_words(config: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    for name in ("quantization_config", "compression_config"):
        words = config.get(name)
        if words is not None and not isinstance(words, Mapping):
            raise ValueError(f"{name} in config.json is {words!r:.80}; expected a JSON object")
        if words:
            yield (
                words
                if "quant_method" in words or name == "quantization_config"
                else {"quant_method": "compressed-tensors", **words}
            )
    for value in config.values():
        if isinstance(value, Mapping) and "model_type" in value:
            yield from _quant_words(value)


def dtype_of_floats(config: Mapping[str, Any] | None) -> torch.dtype:
    """The dtype that a model computes in, by its config.json; bfloat16 where that does not say."""
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
        pickles = f" ({', '.join(others[:3])}: only safetensors are read, no pickles)" if others else ""
        found = ", ".join(file.name for file in files[:3]) or f"no .safetensors{pickles}"
        raise ValueError(f"{folder} has {found}; expected {SINGLE}, or shards with {INDEX}")
    return files[0]


def _files_of_index(path: Path) -> dict[str, str]:
    files = read_json(path).get("weight_map")
    if not isinstance(files, Mapping):
        raise ValueError(f"{path}: weight_map is {files!r:.60}; expected the file of every tensor")
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file or file in (".", "..") or "\\" in file or "\0" in file:
            raise ValueError(f"{path}: {name} is in {file!r:.120}; expected the name of a file in the same folder")
        if not file.endswith(".safetensors"):
            raise ValueError(
                f"{path}: {name} is in {file!r:.120}; expected a .safetensors file, for pickles are not read"
            )
    return dict(files)
