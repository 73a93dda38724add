"""Maps the tensors of a LoRA adapter file to modules of a block, and checks them against the config's sizes and the
adapter's ranks.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_fn.checkpoint.layout import LAYOUTS
from moe_fn.checkpoint.peft_config import AdapterConfig
from moe_fn.checkpoint.peft_versions import is_of_outputs
from moe_fn.checkpoint.safetensors_files import FLOATS, TensorInfo
from moe_fn.config import MoEConfig

_BEFORE = "base_model.model."
_PARTS = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
    "gate_up_proj": "gate_up",
}
_NAME = re.compile(
    rf"(?:moe\.)?experts\.(?:(0|[1-9]\d{{0,8}})\.({'|'.join(_PARTS)})\.|(base_layer\.)?)lora_([AB])\.weight"
)
# Prefixes of names that belong to a block without a module of its own: its tensors share a prefix with attention and
# the rest of the layer.
_OF_NAMELESS_BLOCKS = tuple({beginning for layout in LAYOUTS if not layout.block for beginning in layout.owned})
GateUpLayout = Literal["packed", "interleaved"]
WeightLayout = Literal["out_in", "in_out"]
Shapes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Kept:
    """Layout of the model's parameters that hold all experts; weight_layout is None if the caller did not pass it."""

    weight_layout: WeightLayout | None
    gate_up_layout: GateUpLayout


@dataclass(frozen=True)
class Module:
    """A module of the model that has an adapter: of one expert, or (expert None) a parameter that holds all experts."""

    expert: int | None
    part: str  # "gate", "up", "gate_up" or "down"
    name: str  # in the model
    turned: bool = False  # A has the outputs and B the inputs


def modules_of_block(
    folder: Path, prefix: str, header: Mapping[str, TensorInfo], config: MoEConfig, adapter: AdapterConfig, kept: Kept
) -> dict[Module, tuple[str, str]]:
    """Names of the A and B tensors of each module of the block.

    Raises ValueError for adapters of anything but the block's experts, and for shapes or ranks that do not match.
    """
    found = _names(folder, prefix, header)
    modules: dict[Module, tuple[str, str]] = {}
    unclear = dict[Module, tuple[str, str]]()  # as many inputs as outputs: shapes do not tell A's side
    for (expert, part), sides in found.items():
        if set(sides) != {"A", "B"}:
            raise ValueError(f"{folder} has only {next(iter(sides.values()))}; expected both lora_A and lora_B")
        a, b = header[sides["A"]], header[sides["B"]]
        for name, info in ((sides["A"], a), (sides["B"], b)):
            if len(info.shape) != 2 or info.dtype not in FLOATS:
                raise ValueError(
                    f"{folder}: {name} is {info.dtype} {list(info.shape)}; expected a matrix of {', '.join(FLOATS)}"
                )
        if expert is None:
            module = _parameter(folder, prefix, part, len(found), (a.shape, b.shape), config, adapter)
            size, out = _sizes(config, module.part)
            (modules if size != out else unclear)[module] = sides["A"], sides["B"]
        else:
            modules[_single(folder, prefix, int(expert), part, (a.shape, b.shape), config, adapter)] = (
                sides["A"],
                sides["B"],
            )
    for module, names in unclear.items():
        modules[dataclasses.replace(module, turned=_is_turned(folder, module, set(modules), config, adapter, kept))] = (
            names
        )
    parts = {module.part for module in modules}
    if len({(module.expert, module.part) for module in modules}) < len(found) or (
        "gate_up" in parts and parts & {"gate", "up"}
    ):
        raise ValueError(
            f"{folder}: a product of {prefix}.experts has two adapters; expected adapters of gate and up, or one of "
            "gate_up"
        )
    return modules


def _names(folder: Path, prefix: str, header: Mapping[str, TensorInfo]) -> dict[tuple[str | None, str], dict[str, str]]:
    """Names of the A and B tensors, by the expert and the part in the name."""
    found: dict[tuple[str | None, str], dict[str, str]] = {}
    owned = _OF_NAMELESS_BLOCKS if prefix.rpartition(".")[2].isdecimal() else ("",)
    for name in header:
        below = name.removeprefix(_BEFORE)
        if not below.startswith(tuple(f"{prefix}.{beginning}" for beginning in owned)):
            continue
        match = _NAME.fullmatch(below.removeprefix(prefix + "."))
        if match is None:
            raise ValueError(
                f"{folder}: the adapter has {name}; expected only adapters of the block's experts (routers and shared "
                "experts have none)"
            )
        expert, part, inner, side = match.groups()
        found.setdefault((expert, part or inner or ""), {})[side] = name
    if not found:
        raise ValueError(f"{folder} has no adapter below {prefix}.experts; expected one with PEFT's names")
    if len({expert is None for expert, _ in found}) > 1:
        raise ValueError(
            f"{folder} has adapters below {prefix}.experts of single experts and of parameters that hold all experts; "
            "expected one of the two forms"
        )
    return found


def _is_turned(
    folder: Path, module: Module, others: set[Module], config: MoEConfig, adapter: AdapterConfig, kept: Kept
) -> bool:
    """Whether A has the outputs, for a product with as many inputs as outputs: as in the other parameter of the same
    experts, else by the adapter's peft_version.
    """
    turned = next((other.turned for other in others), None)
    if turned is None:
        turned = is_of_outputs(adapter.version, config, kept.weight_layout, kept.gate_up_layout)
    if turned is None:
        layout = kept.weight_layout or (
            config.weight_layout if config.quant is None else "unknown (the config is quantized)"
        )
        raise ValueError(
            f"{folder}: {module.name} has as many inputs as outputs, and peft_version {adapter.version!r} with "
            f"weight_layout {layout} does not determine which of them A has; expected the model's weight_layout=, or "
            "an adapter of both products"
        )
    return turned


def _sizes(config: MoEConfig, part: str) -> tuple[int, int]:
    """(in, out) of a product."""
    hidden, inner = config.expert_hidden_size, config.intermediate_size
    return {"down": (inner, hidden), "gate_up": (hidden, config.gate_up_size)}.get(part, (hidden, inner))


def _single(
    folder: Path, prefix: str, expert: int, part: str, shapes: Shapes, config: MoEConfig, adapter: AdapterConfig
) -> Module:
    gated = config.gate_up_parts == 2
    if not gated and part in ("gate_proj", "w3"):
        raise ValueError(
            f"{folder}: the adapter is of {part}; expected up_proj or w1 only, because the activation is not gated"
        )
    module = Module(
        expert, _PARTS[part] if gated or _PARTS[part] == "down" else "gate_up", f"{prefix}.experts.{expert}.{part}"
    )
    if expert >= config.num_experts:
        raise ValueError(f"{folder}: the adapter is of {module.name}; expected experts 0..{config.num_experts - 1}")
    (size, out), rank = _sizes(config, module.part), adapter.rank_of(module.name)
    if shapes != ((rank, size), (out, rank)):
        raise ValueError(
            f"{folder}: A and B of {module.name} are {_shapes_text(shapes)}; "
            f"expected {_shapes_text(((rank, size), (out, rank)))}"
        )
    return module


def _parameter(
    folder: Path, prefix: str, inner: str, count: int, shapes: Shapes, config: MoEConfig, adapter: AdapterConfig
) -> Module:
    """The parameter of all experts that an adapter is of; with two adapters the outer one is of down_proj."""
    targets = [name.rpartition(".") for name in adapter.parameters]
    here = f".{prefix}.experts"
    names = [name for path, _, name in targets if not path or here.endswith(f".{path}")] or [
        name for *_, name in targets
    ]
    if count == 2:
        of_nesting = ("gate_up_proj", "up_proj") if inner else ("down_proj",)
        names = [name for name in of_nesting if name in names] or [*of_nesting]
    fits, expected = list[Module](), list[str]()
    for name in dict.fromkeys(name for name in names if name in ("gate_up_proj", "up_proj", "down_proj")):
        module = Module(None, "down" if name == "down_proj" else "gate_up", f"{prefix}.experts.{name}")
        (size, out), rows = _sizes(config, module.part), adapter.rank_of(module.name) * config.num_experts
        straight = ((rows, size), (out, rows))
        if shapes in (straight, ((rows, out), (size, rows))):
            fits.append(dataclasses.replace(module, turned=shapes != straight))
        expected.append(f"{_shapes_text(straight)} of {name}")
    if len({module.part for module in fits}) == 1:
        return fits[0]
    if fits:
        expected = [f"target_parameters to name one for {prefix}.experts, not {' and '.join(dict.fromkeys(names))}"]
    raise ValueError(
        f"{folder}: A and B of {prefix}.experts are {_shapes_text(shapes)}; expected "
        f"{' or '.join(expected) or 'target_parameters to name one'}"
    )


def _shapes_text(shapes: Shapes) -> str:
    return f"{list(shapes[0])} and {list(shapes[1])}"
