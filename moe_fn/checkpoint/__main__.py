"""python -m moe_fn.checkpoint inspect PATH: prints the Mixture-of-Experts layers of a checkpoint, from config.json and
the headers of its files.

Consecutive layers that differ only in their index share a line. The exit status is 1 if a layer could not be loaded,
2 if there is no checkpoint to read or its tensor names are unknown.
"""

import argparse
import dataclasses
import itertools
import json
import re
import sys
from typing import Any

from moe_fn.checkpoint.layers import MoELayer, moe_layers
from moe_fn.config import MoEConfig, QuantConfig, as_activation
from moe_fn.config.activation import PRESETS

_COLUMNS = ("layers", "family", "layout", "experts", "top-k", "hidden", "intermediate", "shared", "dtype", "bytes each")
_SIZES = ("num_experts", "top_k", "hidden_size", "intermediate_size")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_fn.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="print the model's Mixture-of-Experts layers")
    inspect.add_argument("path", help="a checkpoint folder, or a .safetensors file")
    inspect.add_argument("--json", action="store_true", help="print every layer as JSON")
    options = parser.parse_args(arguments)
    try:
        layers = moe_layers(options.path)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps([as_json(layer) for layer in layers], indent=1) if options.json else table(layers))
    return int(any(layer.problem is not None for layer in layers))


def as_json(layer: MoELayer) -> dict[str, Any]:
    """The layer as JSON values; `options` are the fields of its config that differ from the defaults."""
    values = dataclasses.asdict(dataclasses.replace(layer, config=None))
    config = layer.config
    return values | {
        "config": None if config is None else config.to_dict(),
        "options": {} if config is None else options_of(config),
    }


def options_of(config: MoEConfig) -> dict[str, Any]:
    """Fields that differ from the defaults, without the sizes; nested fields have dotted names.

    >>> options_of(MoEConfig(num_experts=8, top_k=2, hidden_size=4, intermediate_size=4, weight_layout="in_out"))
    {'weight_layout': 'in_out'}
    """
    options = (
        _differing(field.name, getattr(config, field.name), field.default) for field in dataclasses.fields(config)
    )
    return {name: value for found in options for name, value in found.items() if name not in _SIZES}


def _differing(name: str, value: Any, default: Any) -> dict[str, Any]:
    if name.endswith("activation"):
        value, default = as_activation(value), as_activation(default)
        if preset := next((preset for preset, known in PRESETS.items() if known == value != default), None):
            return {name: preset}
    if not dataclasses.is_dataclass(value):
        return {} if value == default else {name: value}
    plain = {field.name: getattr(default, field.name, field.default) for field in dataclasses.fields(value)}
    return {
        key: leaf
        for part, of_part in plain.items()
        for key, leaf in _differing(f"{name}.{part}", getattr(value, part), of_part).items()
    }


def table(layers: list[MoELayer]) -> str:
    """The table that `inspect` prints, followed by the options and problems of each group of layers."""
    if not layers:
        return "no Mixture-of-Experts layers"
    groups = [list(group) for _, group in itertools.groupby(layers, key=_alike)]
    rows = [_COLUMNS, *(_row(group) for group in groups)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = sum(layer.bytes for layer in layers)
    return "\n".join(
        [
            *lines,
            "",
            f"{len(layers)} layer{'s' * (len(layers) > 1)}, {_bytes(total)}",
            *itertools.chain.from_iterable(map(_notes, groups)),
        ]
    )


def _alike(layer: MoELayer) -> tuple[Any, ...]:
    """The key that groups layers of one stack which differ in their index only."""
    return dataclasses.replace(
        layer, index=0, prefix=_stack(layer), problem=(layer.problem or "").replace(layer.prefix, "")
    ), layer.config


def _stack(layer: MoELayer) -> str:
    return re.sub(rf"(^|\.){layer.index}(?=\.|$)", r"\1*", layer.prefix, count=1)


def _row(group: list[MoELayer]) -> tuple[str, ...]:
    first, last, config = group[0], group[-1], group[0].config
    indices = str(first.index) if first is last else f"{first.index}-{last.index}"
    if len(group) not in (1, last.index - first.index + 1):
        indices = ",".join(str(layer.index) for layer in group)
    sizes = ("?",) * 5 if config is None else _sizes(config)
    dtype = first.dtype if config is None or config.quant is None else _quant(config.quant)
    return indices, first.family, first.layout or "?", *sizes, dtype, _bytes(first.bytes)


def _quant(quant: QuantConfig) -> str:
    """Abbreviated description of the experts' quantization.

    >>> _quant(QuantConfig(scheme="int4", granularity="group", group_size=128, zero_points=True))
    'int4 group 128, zero points'
    """
    size = (
        f" {quant.group_size}"
        if quant.group_size
        else ""
        if quant.block_shape is None
        else " {}x{}".format(*quant.block_shape)
    )
    return f"{quant.scheme} {quant.granularity}{size}{', zero points' * quant.zero_points}"


def _sizes(config: MoEConfig) -> tuple[str, ...]:
    shared = config.shared
    of_shared = "-" if shared is None else f"{shared.count} x {shared.intermediate_size}"
    return str(config.num_experts), str(config.top_k), str(config.hidden_size), str(config.intermediate_size), of_shared


def _notes(group: list[MoELayer]) -> list[str]:
    first = group[0]
    options = {} if first.config is None else options_of(first.config)
    listed = ", ".join(f"{name}={value}" for name, value in options.items()) or "none"
    lines = ["", f"{_row(group)[0]}  {_stack(first)}", f"  options  {listed}"]
    return lines if first.problem is None else [*lines, f"  problem  {first.problem}"]


def _bytes(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} bytes"


if __name__ == "__main__":
    sys.exit(main())
