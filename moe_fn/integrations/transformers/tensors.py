"""Names of the tensors in transformers' blocks for each path of `MoEWeights`, and conversions; rows of
`moe_fn.families` have the names of single families.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_fn.families import Family
from moe_fn.families.row import Source, Sources, same
from moe_fn.integrations.transformers.reading import without_wrappers

# A conversion from tensors of a block to one of MoEWeights: (tensors, sizes) -> tensor.
Form = Callable[[tuple[Tensor, ...], "Sizes"], Tensor]


@dataclass(frozen=True)
class Sizes:
    """Sizes that tensors may be expanded to."""

    num_experts: int
    num_logits: int


FORMS: dict[str, Form] = {
    "identity": lambda t, sizes: t[0],
    "flatten": lambda t, sizes: t[0].flatten(),
    "concatenate": lambda t, sizes: torch.cat(t),
    "one plus": lambda t, sizes: 1.0 + t[0],  # norms that store weight - 1
    "one plus, expand to experts": lambda t, sizes: (1.0 + t[0]).expand(sizes.num_experts, -1),
    "expand to experts": lambda t, sizes: t[0].expand(sizes.num_experts, -1),
    "expand to logits": lambda t, sizes: t[0].expand(sizes.num_logits),
    "without zero experts": lambda t, sizes: t[0].narrow(0, 0, sizes.num_experts),
    "gates and ups of flat experts": lambda t, sizes: torch.cat(
        [part.unflatten(0, (sizes.num_experts, -1)) for part in t], 1
    ),
    "in_out of flat experts": lambda t, sizes: t[0].unflatten(0, (sizes.num_experts, -1)).transpose(1, 2),
    "stacked gates and ups": lambda t, sizes: torch.cat([part.flatten(0, 1) for part in t]),
    "stacked downs": lambda t, sizes: t[0].transpose(0, 1).flatten(1),
    "stack": lambda t, sizes: torch.stack(t),
    # gate, scale: the scale of the router's norm is multiplied into the gate, divided by the square root of the width
    "scaled gate": lambda t, sizes: t[0] * t[1] * t[0].shape[-1] ** -0.5,
}

_SHARED = ("shared_experts", "shared_expert", "shared_mlp")

# Names that most families share; rows of families have the others.
COMMON: Sources = {
    "gate_up": same("experts.gate_up_proj", "experts.up_proj"),
    "down": same("experts.down_proj"),
    "gate_up_bias": same("experts.gate_up_proj_bias", "experts.up_proj_bias"),
    "down_bias": same("experts.down_proj_bias"),
    "router.gate": same(
        "gate.weight",
        "router.weight",
        "gate.wg.weight",
        "router.gate.weight",
        "router.layer.weight",
        "router.classifier.weight",
    ),
    "router.bias": same("router.bias"),
    "router.correction_bias": (
        *same(
            "gate.e_score_correction_bias", "router.e_score_correction_bias", "e_score_correction_bias", "expert_bias"
        ),
        *same("gate.moe_statics.e_score_correction_bias", form="flatten"),
        *same("gate.balancing_biases"),
    ),
    "router.expert_ids_of_token": same("gate.tid2eid"),
    "shared.gate_up": (
        *(Source("identity", (f"{name}.gate_up_proj.weight",)) for name in _SHARED),
        *(Source("concatenate", (f"{name}.gate_proj.weight", f"{name}.up_proj.weight")) for name in _SHARED),
        *(Source("identity", (f"{name}.up_proj.weight",)) for name in _SHARED),
    ),
    "shared.down": same(*(f"{name}.down_proj.weight" for name in _SHARED)),
    "shared.gate_up_bias": (
        *(Source("concatenate", (f"{name}.gate_proj.bias", f"{name}.up_proj.bias")) for name in _SHARED),
        *(Source("identity", (f"{name}.up_proj.bias",)) for name in _SHARED),
    ),
    "shared.down_bias": same(*(f"{name}.down_proj.bias" for name in _SHARED)),
    "shared.gate": same("shared_expert_gate.weight"),
}

Plan = tuple[tuple[str, Source], ...]  # dotted path in MoEWeights, and its source


def plan_of_block(family: Family, block: nn.Module) -> Plan:
    """The source in this block of each tensor of MoEWeights, without the tensors that it does not have."""
    sources = {**COMMON, **family.live.tensors}
    found = (
        (path, next((s for s in alternatives if _there(block, s)), None)) for path, alternatives in sources.items()
    )
    return tuple((path, source) for path, source in found if source is not None)


def tensor_of(block: nn.Module, source: Source, sizes: Sizes) -> Tensor:
    """A tensor of MoEWeights, from the block's tensors."""
    return FORMS[source.form](tuple(_get(block, name) for name in _names(block, source)), sizes)


def _names(block: nn.Module, source: Source) -> list[str]:
    experts = getattr(block, "experts", None)
    count = len(experts) if isinstance(experts, nn.ModuleDict | nn.ModuleList) else 0
    return [name.format(e=e) for name in source.names for e in (range(count) if "{e}" in name else (0,))]


def _there(block: nn.Module, source: Source) -> bool:
    names = _names(block, source)
    return bool(names) and all(_find(block, name) is not None for name in names)


def _get(block: nn.Module, name: str) -> Tensor:
    found = _find(block, name)
    if found is None:
        raise ValueError(f"{type(block).__name__}.{name} is missing; expected a tensor")
    return found


def _find(block: nn.Module, name: str) -> Tensor | None:
    value: object = block
    for part in name.split("."):
        value = getattr(without_wrappers(value), part, None)  # a ModuleDict's modules are attributes too
    return value if isinstance(value, Tensor) else None
