"""Saves `MoEWeights` as safetensors in a published layout: the inverse of loading."""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from torch import Tensor

from moe_fn.checkpoint.axes import by_axes, of_axes, patterns_of, sizes_of
from moe_fn.checkpoint.choose_layout import layout_of_name
from moe_fn.checkpoint.folder import INDEX, SINGLE, full_name, open_checkpoint
from moe_fn.checkpoint.layout import Layout
from moe_fn.checkpoint.match import names_of
from moe_fn.checkpoint.safetensors_files import read_header
from moe_fn.config import MoEConfig
from moe_fn.families.tensor_names import Entry
from moe_fn.records import WEIGHT_PATHS, MoEWeights, Path, leaves_of_weights
from moe_fn.weights.axes import ANY, axes_of, shape_of
from moe_fn.weights.shapes import expected_shapes


def save_moe_weights(
    path: str | FilePath,
    prefix: str,
    config: MoEConfig,
    weights: MoEWeights,
    *,
    layout: Layout | str,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes the tensors of a block below a prefix, in a layout: to model.safetensors, or above max_shard_bytes to
    shards with an index.

    path is a folder. Existing blocks in it are kept, and the index is created or extended. config.json is not written.
    Each file and the index is written atomically. At most one shard of memory is used in addition to the weights, if
    the layout has other axes than they do.

    Raises ValueError for weights that do not match the config, have no name in the layout, are quantized
    (config.quant), or exist in the folder already.

    Laws
        Saving undoes loading.

    >>> import tempfile
    >>> from moe_fn import RouterWeights
    >>> from moe_fn.checkpoint import load_moe_weights
    >>> config = MoEConfig(num_experts=2, top_k=1, hidden_size=3, intermediate_size=4)
    >>> weights = MoEWeights(gate_up=torch.randn(2, 8, 3), down=torch.randn(2, 3, 4),
    ...     router=RouterWeights(gate=torch.randn(2, 3)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_moe_weights(folder, "model.layers.0.block_sparse_moe", config, weights, layout="mixtral")
    ...     loaded = load_moe_weights(folder, "model.layers.0.block_sparse_moe", config)
    >>> torch.equal(loaded.gate_up, weights.gate_up)
    True
    """
    row = layout_of_name(layout) if isinstance(layout, str) else layout
    leaves = {path: t for path, t in zip(WEIGHT_PATHS, leaves_of_weights(weights), strict=True) if t is not None}
    _check(row, config, leaves)
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise ValueError(f"save_moe_weights: max_shard_bytes is {max_shard_bytes!r}; expected a positive int")
    folder = FilePath(path)
    folder.mkdir(parents=True, exist_ok=True)
    there = dict(open_checkpoint(folder).file_of_tensor) if any(folder.glob("*.safetensors*")) else {}
    tensors = list(_outgoing(row, prefix, config, leaves))
    if clash := next((tensor.name for tensor in tensors if tensor.name in there), None):
        raise ValueError(f"save_moe_weights: {folder} has {clash} already; expected a folder without this block")
    _write(folder, there, _shards(tensors, max_shard_bytes))


@dataclass(frozen=True)
class _Outgoing:
    """A tensor of a file; `make` computes it when it is written."""

    name: str
    bytes: int
    make: Callable[[], Tensor]


def _check(layout: Layout, config: MoEConfig, leaves: Mapping[Path, Tensor]) -> None:
    if config.quant is not None:
        raise ValueError(
            "save_moe_weights: config.quant is not None; expected floats (dequantize_weights): codes are not written"
        )
    if not layout.savable:
        raise ValueError(
            f"save_moe_weights: the layout {layout.name!r} has tensors that hold more than a block; expected another "
            "layout"
        )
    whole = dataclasses.replace(config, parallel=None)  # a rank's part has other shapes and is refused for them
    allowed, patterns, sizes = expected_shapes(whole), patterns_of(config), sizes_of(config)
    named = {entry.weight for entry in layout.entries}
    for path, leaf in leaves.items():
        where = f"save_moe_weights: weights.{'.'.join(path)}"
        shape = shape_of(patterns[path], sizes) if path in allowed else ()
        if path not in allowed or path not in named:
            owner = "the config" if path not in allowed else f"the layout {layout.name!r}"
            raise ValueError(f"{where} is {list(leaf.shape)}; expected None, because {owner} does not have it")
        if leaf.ndim != len(shape) or any(
            size not in (ANY, found) for size, found in zip(shape, leaf.shape, strict=True)
        ):
            raise ValueError(f"{where} is {list(leaf.shape)}; expected {list(shape)} (plain, not prepared)")
    for entry in layout.entries:
        where = f"save_moe_weights: weights.{'.'.join(entry.weight)}"
        if entry.weight in allowed and not entry.optional and entry.weight not in leaves:
            raise ValueError(f"{where} is None; expected a tensor: the layout {layout.name!r} has {entry.name}")


def _outgoing(layout: Layout, prefix: str, config: MoEConfig, leaves: Mapping[Path, Tensor]) -> Iterator[_Outgoing]:
    patterns, sizes = patterns_of(config), sizes_of(config)
    for entry in layout.entries:
        if entry.weight not in leaves:
            continue
        leaf = leaves[entry.weight]
        known = sizes | ({"V": leaf.shape[0]} if "V" in axes_of(entry.axes) else {})
        dtype = leaves[("down",)].dtype if entry.offset else leaf.dtype
        for expert, name in names_of(entry, config):
            make = functools.partial(_tensor, entry, expert, leaf.detach(), patterns[entry.weight], known, dtype)
            yield _Outgoing(full_name(prefix, name), math.prod(shape_of(entry.axes, known)) * dtype.itemsize, make)


def _tensor(
    entry: Entry, expert: int | None, leaf: Tensor, pattern: str, sizes: Mapping[str, int], dtype: torch.dtype
) -> Tensor:
    """The tensor that a file holds under an entry's name."""
    order = axes_of(pattern)
    t = by_axes(leaf, pattern, sizes, order)
    for axis, place in [*entry.pins, *([("E", expert)] if expert is not None else [])]:
        t = t.narrow(order.index(axis), place, 1)
    for axis in set(order) - set(axes_of(entry.axes)) - {"1"}:
        first = t.narrow(order.index(axis), 0, 1)
        if not torch.equal(first.expand_as(t), t):
            raise ValueError(
                f"save_moe_weights: weights.{'.'.join(entry.weight)} differs between experts; "
                f"expected equal values, which {entry.name} holds once"
            )
        t = first
    t = t - entry.offset if entry.offset else t
    return of_axes(t, order, entry.axes).to("cpu", dtype)


def _shards(tensors: Iterable[_Outgoing], most: int) -> Iterator[list[_Outgoing]]:
    shard: list[_Outgoing] = []
    for tensor in tensors:
        if shard and sum(other.bytes for other in shard) + tensor.bytes > most:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _write(folder: FilePath, there: dict[str, str], shards: Iterable[list[_Outgoing]]) -> None:
    shards = list(shards)
    if not there and len(shards) == 1:
        _write_file(folder / SINGLE, shards[0])
        return
    numbers = (number for number in itertools.count(1) if not (folder / _shard_name(number)).exists())
    # Other readers take a file of this name for the whole checkpoint, even if there is an index.
    if SINGLE in there.values():
        moved = _shard_name(next(numbers))
        (folder / SINGLE).replace(folder / moved)
        there = {name: moved if file == SINGLE else file for name, file in there.items()}
    for shard in shards:
        file = _shard_name(next(numbers))
        _write_file(folder / file, shard)
        there |= {tensor.name: file for tensor in shard}
    total = sum(
        tensor.stop - tensor.start for file in set(there.values()) for tensor in read_header(folder / file).values()
    )
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": there}, indent=2) + "\n"
    _whole_or_not(folder / INDEX, lambda part: part.write_text(text))


def _shard_name(number: int) -> str:
    return f"model-{number:05}.safetensors"


def _write_file(path: FilePath, shard: list[_Outgoing]) -> None:
    from safetensors.torch import save_file

    tensors = {tensor.name: tensor.make() for tensor in shard}
    _whole_or_not(path, lambda part: save_file(tensors, str(part), metadata={"format": "pt"}))


def _whole_or_not(path: FilePath, write: Callable[[FilePath], object]) -> None:
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
