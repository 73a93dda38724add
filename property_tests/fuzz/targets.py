"""Targets of fuzzing: each damages a seed by bytes, reads it, and fails unless the result is valid or a ValueError is
raised.
"""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fuzz import seeds
from fuzz.choices import Choices
from fuzz.mutate import damaged_bytes, damaged_json, dumped
from moe_fn import MoEConfig
from moe_fn.checkpoint import load_lora, load_moe_layer, moe_layers
from moe_fn.checkpoint.safetensors_files import parse_json
from moe_fn.families import config_of_layer
from moe_fn.records import leaves_of_weights

_dictionary = functools.cache(seeds.dictionary)
_config_dictionary = functools.cache(seeds.config_dictionary)
_adapters = functools.cache(seeds.adapters)
_models = functools.cache(seeds.models)


def config(data: bytes) -> str:
    """Reads a damaged to_dict with MoEConfig.from_dict."""
    choices = Choices(data)
    values = choices.one_of(seeds.CONFIGS).to_dict()
    for _ in range(1 + choices.below(3)):
        values = damaged_json(choices, values, _config_dictionary())
    try:
        made = MoEConfig.from_dict(values)
    except ValueError as error:
        return _message(error)
    again = MoEConfig.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made and hash(again) == hash(made)
    return "read"


def family(data: bytes) -> str:
    """Reads the MoEConfig of a layer from a damaged config.json."""
    choices = Choices(data)
    values: Any = choices.one_of(_models())
    values = {"text_config": values, "model_type": "outer"} if choices.below(8) == 7 else values
    for _ in range(choices.below(3)):
        values = damaged_json(choices, values, _dictionary())
    text = dumped(values)
    text = damaged_bytes(choices, text, len(text)) if choices.below(8) == 7 else text
    try:
        config_of_layer(parse_json("config.json", text), choices.below(3))
    except ValueError as error:
        return _message(error)
    return "read"


def checkpoint(data: bytes) -> str:
    """Reads the layers of a damaged folder."""
    choices = Choices(data)
    files = damaged_files(choices, choices.one_of(seeds.checkpoints()))
    return _with_folder(files, _read_checkpoint)


def adapter(data: bytes) -> str:
    """Reads the LoRA adapter of a damaged folder of PEFT."""
    choices = Choices(data)
    files = damaged_files(choices, choices.one_of(_adapters()))
    return _with_folder(files, lambda folder: load_lora(folder, "layers.0.mlp", MoEConfig(**seeds.SIZES)))


TARGETS: dict[str, Callable[[bytes], str]] = {
    "config": config,
    "family": family,
    "checkpoint": checkpoint,
    "adapter": adapter,
}


def damaged_files(choices: Choices, files: seeds.Files) -> seeds.Files:
    """Returns the files with up to three changes: in JSON, in a header, or in bytes."""
    files = dict(files)
    for _ in range(choices.below(4)):
        name = choices.one_of(sorted(files))
        content, tensors = files[name], name.endswith(".safetensors")
        end = 8 + int.from_bytes(content[:8], "little") if tensors else len(content)
        if choices.below(5) == 4:
            files[name] = damaged_bytes(choices, content, end)
            continue
        try:
            values = json.loads(content[8:end] if tensors else content)
        except ValueError:  # damaged before
            continue
        text = dumped(damaged_json(choices, values, _dictionary()))
        files[name] = len(text).to_bytes(8, "little") + text + content[end:] if tensors else text
    return files


def _with_folder(files: seeds.Files, read: Callable[[Path], Any]) -> str:
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            read(Path(folder))
        except ValueError as error:
            return _message(error).replace(folder, "")
    return "read"


def _read_checkpoint(folder: Path) -> None:
    for layer in moe_layers(folder):
        made, weights = load_moe_layer(folder, layer.prefix)
        assert layer.problem is None and made == layer.config
        assert all(isinstance(t, torch.Tensor) for t in leaves_of_weights(weights) if t is not None)


@functools.cache
def _memory() -> str | None:
    """Returns a folder in memory if there is one, as thousands of folders are written; else None."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _message(error: ValueError) -> str:
    assert type(error) is ValueError or isinstance(error, UnicodeError | json.JSONDecodeError), type(error)
    assert str(error)
    return f"refused: {error}"
