"""Names of the tensors in transformers' blocks for each path of `MoEWeights`: common names, and differences by
family.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_fn.integrations.transformers.reading import without_wrappers

# A conversion from tensors of a block to one of MoEWeights: (tensors, sizes) -> tensor.
Form = Callable[[tuple[Tensor, ...], "Sizes"], Tensor]


@dataclass(frozen=True)
class Sizes:
    """Sizes that tensors may be expanded to."""

    num_experts: int
    num_logits: int


FORMS: dict[str, Form] = {
    "as it is": lambda t, sizes: t[0],
    "flat": lambda t, sizes: t[0].flatten(),
    "end to end": lambda t, sizes: torch.cat(t),
    "one plus": lambda t, sizes: 1.0 + t[0],  # norms that store weight - 1
    "one plus, to every expert": lambda t, sizes: (1.0 + t[0]).expand(sizes.num_experts, -1),
    "to every expert": lambda t, sizes: t[0].expand(sizes.num_experts, -1),
    "to every logit": lambda t, sizes: t[0].expand(sizes.num_logits),
    "experts with weights": lambda t, sizes: t[0].narrow(0, 0, sizes.num_experts),
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


@dataclass(frozen=True)
class Source:
    """The source of one tensor of MoEWeights: a form, and names of the block's tensors ({e}: each expert in order)."""

    form: str
    names: tuple[str, ...]


def _is(*alternatives: str, form: str = "as it is") -> tuple[Source, ...]:
    return tuple(Source(form, (name,)) for name in alternatives)


def _of(form: str, *names: str) -> tuple[Source, ...]:
    return (Source(form, names),)


_SHARED = ("shared_experts", "shared_expert", "shared_mlp")
# By the dotted path in MoEWeights; the first source whose tensors exist is used.
Sources = Mapping[str, tuple[Source, ...]]

COMMON: Sources = {
    "gate_up": _is("experts.gate_up_proj", "experts.up_proj"),
    "down": _is("experts.down_proj"),
    "gate_up_bias": _is("experts.gate_up_proj_bias", "experts.up_proj_bias"),
    "down_bias": _is("experts.down_proj_bias"),
    "router.gate": _is(
        "gate.weight",
        "router.weight",
        "gate.wg.weight",
        "router.gate.weight",
        "router.layer.weight",
        "router.classifier.weight",
    ),
    "router.bias": _is("router.bias"),
    "router.correction_bias": (
        *_is(
            "gate.e_score_correction_bias", "router.e_score_correction_bias", "e_score_correction_bias", "expert_bias"
        ),
        *_is("gate.moe_statics.e_score_correction_bias", form="flat"),
        *_is("gate.balancing_biases"),
    ),
    "router.expert_ids_of_token": _is("gate.tid2eid"),
    "shared.gate_up": (
        *(Source("as it is", (f"{name}.gate_up_proj.weight",)) for name in _SHARED),
        *(Source("end to end", (f"{name}.gate_proj.weight", f"{name}.up_proj.weight")) for name in _SHARED),
        *(Source("as it is", (f"{name}.up_proj.weight",)) for name in _SHARED),
    ),
    "shared.down": _is(*(f"{name}.down_proj.weight" for name in _SHARED)),
    "shared.gate_up_bias": (
        *(Source("end to end", (f"{name}.gate_proj.bias", f"{name}.up_proj.bias")) for name in _SHARED),
        *(Source("as it is", (f"{name}.up_proj.bias",)) for name in _SHARED),
    ),
    "shared.down_bias": _is(*(f"{name}.down_proj.bias" for name in _SHARED)),
    "shared.gate": _is("shared_expert_gate.weight"),
}

_GEMMA: Sources = {
    "router.gate": _of("scaled gate", "router.proj.weight", "router.scale"),
    "router.expert_scale": _is("router.per_expert_scale"),
    "input_norm": _is("pre_feedforward_layernorm_2.weight"),
    "output_norm": _is("post_feedforward_layernorm_2.weight"),
}

# Differences by the first name of a family (`moe_fn.families`).
OF_FAMILY: Mapping[str, Sources] = {
    "gemma4_text": _GEMMA,
    "axk1": {"output_norm": _is("post_mlp_layernorm.weight")},
    "dbrx": {
        "gate_up": _of("gates and ups of flat experts", "experts.mlp.w1", "experts.mlp.v1"),
        "down": _of("in_out of flat experts", "experts.mlp.w2"),
    },
    "inkling_text": {
        "router.expert_scale": _is("gate.global_scale", form="to every logit"),
        "shared.gate_up": _of("stacked gates and ups", "shared_experts.gate_proj", "shared_experts.up_proj"),
        "shared.down": _of("stacked downs", "shared_experts.down_proj"),
    },
    # The block adds one bias once; a bias of every expert gives the same, because the routing weights sum to 1.
    "jetmoe": {
        "gate_up": _is("input_linear.weight"),
        "down": _is("output_linear.weight"),
        "down_bias": _is("bias", form="to every expert"),
    },
    "longcat_flash": {"gate_up": _is("experts.gate_up_proj", form="experts with weights")},
    "muse_spark_text": {
        "latent.input": _is("pre_expert_proj.weight"),
        "latent.input_norm": _is("pre_expert_norm.weight", form="one plus"),
        "latent.output": _is("post_expert_proj.weight"),
        "expert_norm": _is("experts.post_expert_norm.weight", form="one plus, to every expert"),
    },
    "nemotron_h": {
        "latent.input": _is("fc1_latent_proj.weight"),
        "latent.input_bias": _is("fc1_latent_proj.bias"),
        "latent.output": _is("fc2_latent_proj.weight"),
        "latent.output_bias": _is("fc2_latent_proj.bias"),
    },
    "switch_transformers": {
        "gate_up": _of("stack", "experts.expert_{e}.wi.weight"),
        "down": _of("stack", "experts.expert_{e}.wo.weight"),
        "router.bias": _is("router.classifier.bias"),
    },
    "zaya": {"router.gate": ()},  # the router is a network with a state: the caller passes logits
}

Plan = tuple[tuple[str, Source], ...]  # dotted path in MoEWeights, and its source


def plan_of_block(family: str, block: nn.Module) -> Plan:
    """The source in this block of each tensor of MoEWeights, without the tensors that it does not have."""
    sources = {**COMMON, **OF_FAMILY.get(family, {})}
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
