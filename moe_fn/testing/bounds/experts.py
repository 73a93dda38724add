"""Error bounds of experts, LoRA adapters and shared experts: tokens [T, ...], slots [T, top_k, ...]."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fn.config import MoEConfig, SharedExpertsConfig, as_activation
from moe_fn.records import LoRAWeights, MoEWeights, SharedWeights
from moe_fn.reference.experts import experts_of_weights
from moe_fn.reference.quant import matrices
from moe_fn.testing.bounds.activation import activated
from moe_fn.testing.bounds.ball import Ball, Units, exact, gamma, monotone, norm, plus, product, stored, times, wide
from moe_fn.testing.bounds.inputs import coded


@dataclass(frozen=True)
class Outcome:
    """A ball; tied: whether a code of rounded inputs is undecided; jumps: whether an activation's derivative is."""

    ball: Ball
    tied: bool
    jumps: bool


@dataclass(frozen=True)
class Slots:
    """ids [T, top_k] of experts, 0 for slots without one; present [T, top_k] bool; adapters [T], -1 for none."""

    ids: Tensor
    present: Tensor
    adapters: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """tensor[e] for the expert e of each slot: [E, ...] -> [T, top_k, ...]."""
        return tensor[self.ids]


def expert_rows(
    units: Units, config: MoEConfig, weights: MoEWeights, v: Ball, slots: Slots, single: bool, ranks: int = 1
) -> Outcome:
    """The experts' outputs for v [T, top_k, Hx]: [T, top_k, Hx].

    rows = down @ act(gate_up @ v + bias) + bias, each product stored once in the layer's dtype, the rest in float32.
    With several ranks, each has a part of the sums, which is stored, sent and added in the layer's dtype.
    """
    hidden, tied = _product(units, config, weights, "gate_up", v, slots, single)
    hidden = _with_adapters(units, weights.lora, "gate_up", v, hidden, slots)
    hidden = _with_bias(units, hidden, weights.gate_up_bias, slots)
    a, jumps = activated(units, as_activation(config.activation), hidden, config.gate_up_layout)
    a = stored(units, a)
    out, also_tied = _product(units, config, weights, "down", a, slots, single, ranks)
    out = _with_adapters(units, weights.lora, "down", a, out, slots)
    out = stored(units, _with_bias(units, out, weights.down_bias, slots))
    if config.expert_norm is not None and weights.expert_norm is not None:
        out = _normed(units, config, out, exact(slots.of(weights.expert_norm)))
    some = slots.present.unsqueeze(-1)
    return Outcome(out, bool(((tied | also_tied) & slots.present).any()), bool((jumps & some).any()))


def in_parts(units: Units, y: Ball, matrix: Ball, v: Ball, ranks: int) -> Ball:
    """y = matrix @ v as a sum of parts stored by ranks: ranks + 1 more roundings of |matrix| |v|, and of y itself."""
    if ranks == 1:
        return y
    size = product(units, Ball(matrix.value.abs(), matrix.radius), Ball(v.value.abs(), v.radius))
    extra = gamma(ranks + 1, units.stored) * (size.value + size.radius + y.value.abs() + y.radius)
    return Ball(y.value, y.radius + extra)


def _product(
    units: Units, config: MoEConfig, weights: MoEWeights, name: str, v: Ball, slots: Slots, single: bool, ranks: int = 1
) -> tuple[Ball, Tensor]:
    seen, tied = v, torch.zeros_like(slots.present)
    if config.quant is not None and config.quant.activations is not None:
        scale = None if weights.quant is None else getattr(weights.quant, f"{name}_input_scale")
        static = None if scale is None else slots.of(scale.to(torch.float32).to(torch.float64))
        seen, undecided = coded(config.quant.activations, v, static, _largest(config, v, slots), single)
        seen, tied = stored(units, wide(units, seen)), undecided.any(-1)
    matrix = _matrices(units, config, weights, name, slots)
    return in_parts(units, stored(units, product(units, matrix, seen)), matrix, seen, ranks), tied


def _largest(config: MoEConfig, v: Ball, slots: Slots) -> Ball | None:
    """The largest magnitude over rows with an expert, where all inputs of a call share one scale; else None."""
    if config.quant is None or not config.quant.rounds_by_call:
        return None
    some = slots.present.unsqueeze(-1).expand_as(v.value)
    values, radii = v.value.abs()[some], v.radius.expand_as(v.value)[some]
    zero = torch.zeros((), dtype=torch.float64)
    return Ball(values.max() if values.numel() else zero, radii.max() if radii.numel() else zero)


def _matrices(units: Units, config: MoEConfig, weights: MoEWeights, name: str, slots: Slots) -> Ball:
    """The matrix of each slot's expert.

    Decoded weights are rounded to the layer's dtype; with zero points, the error is that of a difference of larger
    terms.
    """
    experts = torch.stack([getattr(expert, name) for expert in experts_of_weights(config, weights)])
    radius = torch.zeros_like(experts)
    if config.quant is not None:
        size = experts.abs()
        radius = (units.stored + 4 * units.wide) * size
        if weights.quant is not None and config.quant.zero_points:
            nothing = {f"{product}_zero_point": None for product in ("gate_up", "down")}
            without = dataclasses.replace(weights, quant=dataclasses.replace(weights.quant, **nothing))
            raw = torch.stack(matrices(config, without, name))
            radius = radius + (experts.shape[-1] + 4) * units.wide * (raw.abs() + (raw - experts).abs())
    return Ball(slots.of(experts), slots.of(radius))


def _with_bias(units: Units, rows: Ball, bias: Tensor | None, slots: Slots) -> Ball:
    return rows if bias is None else wide(units, plus(rows, exact(slots.of(bias))))


def _with_adapters(units: Units, lora: LoRAWeights | None, name: str, v: Ball, out: Ball, slots: Slots) -> Ball:
    a = None if lora is None else getattr(lora, f"{name}_a")
    b = None if lora is None else getattr(lora, f"{name}_b")
    if a is None or b is None:
        return out
    adapters = slots.adapters.unsqueeze(-1)
    known = (adapters >= 0) & (adapters < len(a))

    def of_slot(t: Tensor) -> Ball:
        chosen = t[torch.where(known, adapters, 0), slots.ids if t.shape[1] > 1 else torch.zeros_like(slots.ids)]
        return exact(torch.where(known[..., None, None], chosen, 0))

    added = stored(units, product(units, of_slot(b), stored(units, product(units, of_slot(a), v))))
    return wide(units, plus(out, added))


def _normed(units: Units, config: MoEConfig, rows: Ball, scale: Ball) -> Ball:
    if config.expert_norm is None:
        return rows
    if config.expert_norm.scale == "before":
        return stored(units, norm(units, wide(units, times(rows, scale)), config.expert_norm.epsilon))
    return stored(units, wide(units, times(norm(units, rows, config.expert_norm.epsilon), scale)))


def shared_rows(
    units: Units, shared: SharedExpertsConfig, weights: SharedWeights, x: Ball, of_router: Ball | None, ranks: int = 1
) -> Outcome:
    """The shared experts' output for x [T, H]."""
    hidden = stored(units, product(units, exact(weights.gate_up), x))
    hidden = hidden if weights.gate_up_bias is None else wide(units, plus(hidden, exact(weights.gate_up_bias)))
    a, jumps = activated(units, as_activation(shared.activation), hidden, "packed")
    if shared.gate == "router" and of_router is not None:
        a = wide(units, times(a, of_router.map(lambda t: t.repeat_interleave(shared.intermediate_size, -1))))
    a = stored(units, a)
    y = in_parts(units, stored(units, product(units, exact(weights.down), a)), exact(weights.down), a, ranks)
    y = y if weights.down_bias is None else stored(units, plus(y, exact(weights.down_bias)))
    if shared.gate == "sigmoid" and weights.gate is not None:
        gate = wide(units, monotone(wide(units, product(units, exact(weights.gate), x)), torch.sigmoid), 6)
        y = stored(units, wide(units, times(y, gate)))
    return Outcome(y, False, bool(jumps.any()))
