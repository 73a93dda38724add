"""Finds the Mixture-of-Experts layers of a checkpoint by the names of their tensors, and loads them with the config
that config.json describes.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_fn.balance import Placement
from moe_fn.checkpoint.choose_layout import anchors_of, layouts_of_family, plan_of_block, quant_of_block, rows_of_block
from moe_fn.checkpoint.folder import Checkpoint, Headers, model_types, open_checkpoint, read_headers
from moe_fn.checkpoint.layout import LAYOUTS, Layout
from moe_fn.checkpoint.loading import load_from
from moe_fn.checkpoint.progress import Progress, clear
from moe_fn.checkpoint.slices import Wanted
from moe_fn.config import MoEConfig, ParallelConfig
from moe_fn.families import config_of_layer
from moe_fn.records import MoEWeights

_LAYER = r"(?P<layer>(?:.+\.)?(?:layers|blocks|block|h)\.(?P<index>\d+)(?:\.layer\.\d+)?)"
# Output projections of modules that replace the experts in other layers: a dense MLP, or attention (Nemotron-H).
_NO_EXPERTS = r"\.(?:mlp|feed_forward|ffn|mixer)\.(?:down_proj|out_proj|o_proj|w2|wo|fc2|linear_fc2)(?:\.|$)"


@dataclass(frozen=True)
class MoELayer:
    """A layer of a checkpoint. `problem` says why it cannot be loaded; then config or layout may be None.

    index   of the layer, as in its name              prefix  of the names of its tensors
    family  model_type of config.json                 layout  name of the row of `moe_fn.checkpoint.LAYOUTS`
    dtype   of its experts, by the format's name      bytes   of all tensors that would be loaded
    """

    index: int
    prefix: str
    family: str
    layout: str | None
    config: MoEConfig | None
    dtype: str
    bytes: int
    problem: str | None


def moe_layers(path: str | Path) -> list[MoELayer]:
    """The Mixture-of-Experts layers of a checkpoint, in order. Headers are read and checked, tensors are not.

    Raises ValueError for a folder without safetensors, for headers that do not match their files, and if the tensor
    names or config.json indicate experts but no known layout has such names. An error of a single layer is its
    `problem`. A model without experts has no layers.

    >>> import json, tempfile
    >>> from moe_fn import RouterWeights
    >>> from moe_fn.checkpoint import save_moe_weights
    >>> values = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1, "hidden_size": 3,
    ...     "intermediate_size": 4}
    >>> weights = MoEWeights(gate_up=torch.randn(2, 8, 3), down=torch.randn(2, 3, 4),
    ...     router=RouterWeights(gate=torch.randn(2, 3)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_moe_weights(folder, "model.layers.0.block_sparse_moe", config_of_layer(values, 0), weights,
    ...         layout="mixtral")
    ...     _ = (Path(folder) / "config.json").write_text(json.dumps(values))
    ...     (layer,) = moe_layers(folder)
    ...     config, loaded = load_moe_layer(folder, layer.index)
    >>> layer.prefix, layer.config == config, torch.equal(loaded.down, weights.down)
    ('model.layers.0.block_sparse_moe', True, True)
    """
    checkpoint = open_checkpoint(path)
    headers = read_headers(checkpoint, sorted(set(checkpoint.file_of_tensor.values())))
    return [_describe(checkpoint, headers, prefix, index) for prefix, index in _prefixes(checkpoint).items()]


def load_moe_layer(
    path: str | Path,
    layer: int | str,
    *,
    parallel: ParallelConfig | None = None,
    layout: Layout | str | None = None,
    experts: Sequence[int] | None = None,
    intermediate: slice | None = None,
    shared_intermediate: slice | None = None,
    placement: Placement | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[MoEConfig, MoEWeights]:
    """The config and the weights of a layer, by its index, or by its prefix if two stacks of layers share indices.

    parallel describes the ranks that share the layer: it becomes config.parallel, and the weights are this rank's part.
    The other arguments are those of load_moe_weights. The config has the sizes of the whole layer even if only slices
    are loaded.

    Raises ValueError as load_moe_weights and `moe_fn.families.config_of_layer` do, for a layer without experts, and for
    a layer that cannot be divided between these ranks.
    """
    checkpoint = open_checkpoint(path)
    prefix, index = _find(checkpoint, layer)
    config = dataclasses.replace(_config(checkpoint, prefix, index, layout), parallel=parallel)
    wanted = Wanted(experts, intermediate, shared_intermediate, placement)
    return config, load_from(checkpoint, prefix, config, layout, wanted, dtype=dtype, device=device)


def load_moe_layers(
    path: str | Path,
    layers: Iterable[int | str] | None = None,
    progress: bool = True,
    *,
    parallel: ParallelConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, MoEConfig, MoEWeights]]:
    """Iterates over layers as (prefix, config, weights); layers=None iterates over all. The iterator holds only the
    layer that is being loaded.

    parallel applies to every layer, as in load_moe_layer. Replicated experts (num_physical) are refused: their
    placement differs between layers, so load_moe_layer takes it. progress prints the layer that is being read to
    stderr: a bar on a terminal, lines otherwise.

    Raises ValueError as load_moe_layer does, for any of the layers before the first is loaded.
    """
    checkpoint = open_checkpoint(path)
    wanted = list(_prefixes(checkpoint).items()) if layers is None else [_find(checkpoint, layer) for layer in layers]
    if parallel is not None and parallel.num_physical is not None:
        raise ValueError(
            "load_moe_layers: parallel.num_physical is given; expected None (load_moe_layer takes a layer's placement)"
        )
    configs = [dataclasses.replace(_config(checkpoint, prefix, index), parallel=parallel) for prefix, index in wanted]
    try:
        for done, ((prefix, _), config) in enumerate(zip(wanted, configs, strict=True)):
            if progress:
                Progress(total=len(wanted), done=done, label=checkpoint.folder.name).say(prefix)
            yield prefix, config, load_from(checkpoint, prefix, config, None, Wanted(), dtype=dtype, device=device)
    finally:
        if progress:
            clear()


def _prefixes(checkpoint: Checkpoint) -> dict[str, int]:
    """The prefix of every block with the index of its layer, sorted by name."""
    rows = layouts_of_family(model_types(checkpoint.config))
    for candidates in (rows, LAYOUTS):
        anchors = "|".join(sorted({_anchor(row) for row in candidates}))
        pattern = re.compile(f"{_LAYER}(?P<rest>{anchors})")
        found = {}
        for name in checkpoint.file_of_tensor:
            if match := pattern.fullmatch(name):
                block = next((row.block for row in candidates if re.fullmatch(_anchor(row), match["rest"])), "")
                found[".".join(filter(None, (match["layer"], block)))] = int(match["index"])
        if found:
            break
    if not found:
        _refuse_unknown_names(checkpoint, rows)
    return dict(
        sorted(
            found.items(),
            key=lambda item: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", item[0])],
        )
    )


def _refuse_unknown_names(checkpoint: Checkpoint, rows: Sequence[Layout]) -> None:
    """Raises ValueError if tensor names or config.json indicate experts: no row of the table has their names."""
    named = [name for name in checkpoint.file_of_tensor if re.search(r"(?:^|[._])experts(?:[._]|$)", name)]
    some = named or (_names_without_experts(checkpoint, rows) if checkpoint.is_whole else [])
    if not some:
        return
    family = (model_types(checkpoint.config) or ("?",))[0]
    expected = list(dict.fromkeys(".".join(filter(None, ("layers.N", row.block, row.anchor))) for row in rows))
    raise ValueError(
        f"{checkpoint.folder} has experts ({'by its tensors' if named else 'by its config.json'}), but no names that "
        f"are known for model_type {family!r}: it has {', '.join(some[:3])}; expected names like "
        f"{', '.join(expected[:4])}"
    )


def _names_without_experts(checkpoint: Checkpoint, rows: Sequence[Layout]) -> list[str]:
    """Names of the first layer that has at least two experts according to config.json, but no known tensor of experts
    or of a dense MLP that replaces them.
    """
    names: dict[tuple[int, str], list[str]] = {}
    filled = set[str]()
    # Blocks without a name of their own have a dense MLP in addition to the experts, not instead of them.
    has_dense_mlp_too = not all(row.block for row in rows)
    for name in checkpoint.file_of_tensor:
        match = re.match(_LAYER, name)
        if match is not None and len(match["index"]) < 10:
            names.setdefault((int(match["index"]), match["layer"]), []).append(name)
            if not has_dense_mlp_too and re.match(_NO_EXPERTS, name[match.end() :]):
                filled.add(match["layer"])
    for index, layer in sorted(names):
        with contextlib.suppress(ValueError):
            if (
                layer not in filled
                and checkpoint.config is not None
                and config_of_layer(checkpoint.config, index).num_experts > 1
            ):
                return names[index, layer]
    return []


def _anchor(row: Layout) -> str:
    names = "|".join(re.escape("." + ".".join(filter(None, (row.block, name)))) for name in anchors_of(row))
    return names.replace(r"\{e\}", r"\d+").replace(r"\{second\}", r"\d+")


def _find(checkpoint: Checkpoint, layer: int | str) -> tuple[str, int]:
    there = _prefixes(checkpoint)
    found = [(prefix, index) for prefix, index in there.items() if layer in (prefix, index)]
    if len(found) != 1:
        if found:
            raise ValueError(
                f"{checkpoint.folder} has {len(found)} layers {layer!r}; expected one of the prefixes "
                f"{', '.join(p for p, _ in found)}"
            )
        indices = f"one of {', '.join(map(str, dict.fromkeys(there.values())))}" if there else "a model with experts"
        raise ValueError(f"{checkpoint.folder} has no experts in layer {layer!r}; expected {indices}")
    return found[0]


def _config(checkpoint: Checkpoint, prefix: str, index: int, layout: Layout | str | None = None) -> MoEConfig:
    if checkpoint.config is None:
        raise ValueError(f"{checkpoint.folder} has no config.json; expected one, or load_moe_weights with a config")
    config = config_of_layer(checkpoint.config, index, prefix)
    quant = quant_of_block(checkpoint, prefix, rows_of_block(checkpoint, prefix, layout), config.num_experts)
    return config if quant is None else dataclasses.replace(config, quant=quant, weight_layout="out_in")


def _describe(checkpoint: Checkpoint, headers: Headers, prefix: str, index: int) -> MoELayer:
    below = [info for tensors in headers.values() for name, info in tensors.items() if name.startswith(prefix + ".")]
    largest = max(below, key=lambda info: info.stop - info.start)
    family = (model_types(checkpoint.config) or ("?",))[0]
    dtype, size = largest.dtype, sum(info.stop - info.start for info in below)
    config = None
    try:
        config = _config(checkpoint, prefix, index)
        plan = plan_of_block(checkpoint, headers, prefix, config, None)
    except ValueError as error:
        return MoELayer(index, prefix, family, None, config, dtype, size, str(error))
    parts: Mapping[str, int] = {
        part.name: part.info.stop - part.info.start for found in plan.parts.values() for part in found
    }
    dtype = plan.parts[("down",)][0].info.dtype
    return MoELayer(index, prefix, family, plan.layout.name, config, dtype, sum(parts.values()), None)
