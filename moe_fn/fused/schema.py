"""What the ops of moe_fn.ops.routed are told: a config and weights as tensors and scalars, and back."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moe_fn.config import MoEConfig, as_activation
from moe_fn.config.activation import activation_of_scalars
from moe_fn.config.parts import padding_experts
from moe_fn.config.quant import quant_of_json
from moe_fn.numerics import accumulation_dtype
from moe_fn.ops.routed import NUM_TENSORS
from moe_fn.records import MoEWeights, QuantWeights, Routing

QUANT_FIELDS = tuple(field.name for field in dataclasses.fields(QuantWeights))
NUM_FLOATS = NUM_TENSORS - len(QUANT_FIELDS)  # tensors that weights of floats have too; those of QuantWeights follow


def packed(config: MoEConfig, weights: MoEWeights, x: Tensor, ids: Tensor, w: Tensor) -> tuple[Any, ...]:
    """The arguments of an op, in the order of its schema, up to `keep`."""
    a, quant = as_activation(config.activation), None if config.quant is None else weights.quant
    return (
        x, ids, w, weights.gate_up, weights.down, _readable(weights.gate_up_bias, x), _readable(weights.down_bias, x),
        *(None if quant is None else getattr(quant, name) for name in QUANT_FIELDS),
        config.intermediate_size, config.weight_layout == "out_in", a.function, a.gated,
        config.gate_up_layout == "interleaved",
        a.alpha, a.up_offset, a.limit, a.limit_at == "output", a.gate_cap, a.up_cap,
        "" if config.quant is None else config.quant.json,
        config.batch_invariant,
    )  # fmt: skip


def _readable(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """A bias as the kernels read it: in the dtype of x, or in the one that they add up in."""
    if bias is None or bias.dtype == x.dtype or bias.dtype == (wide := accumulation_dtype(x.dtype)):
        return bias
    return bias.to(wide)


def with_floats(args: Sequence[Any], weights: MoEWeights) -> tuple[Any, ...]:
    """The arguments with other gate_up and down, which are plain floats."""
    beside = (None,) * len(QUANT_FIELDS)
    return (*args[:3], weights.gate_up, weights.down, *args[5:NUM_FLOATS], *beside, *args[NUM_TENSORS:-2], "", args[-1])


def unpacked(args: Sequence[Any]) -> tuple[MoEConfig, MoEWeights, Tensor, Routing]:
    """What `packed` was given."""
    x, ids, w, gate_up, down, gate_up_bias, down_bias, *beside = args[:NUM_TENSORS]
    config = _config_of(int(gate_up.shape[0]), int(ids.shape[1]), int(x.shape[1]), *args[NUM_TENSORS:])
    quant = None if config.quant is None else QuantWeights(**dict(zip(QUANT_FIELDS, beside, strict=True)))
    weights = MoEWeights(gate_up=gate_up, down=down, gate_up_bias=gate_up_bias, down_bias=down_bias, quant=quant)
    return config, weights, x, Routing(expert_ids=ids, weights=w)


@functools.lru_cache
def _config_of(
    num_experts: int, top_k: int, hidden: int, intermediate: int, transposed: bool, function: Any, gated: bool,
    interleaved: bool,
    alpha: float, up_offset: float, limit: float | None, limit_output: bool, gate_cap: float | None,
    up_cap: float | None, quant: str,
    invariant: bool,
) -> MoEConfig:  # fmt: skip
    """The config, as far as the op is told it."""
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        zero_experts=padding_experts(num_experts, top_k),
        hidden_size=hidden,
        intermediate_size=intermediate,
        activation=activation_of_scalars(function, gated, alpha, up_offset, limit, limit_output, gate_cap, up_cap),
        gate_up_layout="interleaved" if interleaved else "packed",
        weight_layout="out_in" if transposed else "in_out",
        quant=quant_of_json(quant) if quant else None,
        batch_invariant=invariant,
    )
