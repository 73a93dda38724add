"""A config and weights as the arguments of the fused op (`moe_fn.kernels.arguments`), and back."""

import functools

from torch import Tensor

from moe_fn.config import ActivationConfig, LoRAConfig, MoEConfig, as_activation
from moe_fn.config.parts import padding_experts
from moe_fn.config.quant import quant_of_json
from moe_fn.kernels.arguments import RoutedExpertsArguments
from moe_fn.numerics import accumulation_dtype
from moe_fn.records import LoRAWeights, MoEWeights, Routing


def packed(
    config: MoEConfig, weights: MoEWeights, x: Tensor, ids: Tensor, w: Tensor, adapter_ids: Tensor | None = None
) -> RoutedExpertsArguments:
    """The arguments of the op."""
    return RoutedExpertsArguments(
        x=x,
        expert_ids=ids,
        expert_weights=w,
        gate_up=weights.gate_up,
        down=weights.down,
        gate_up_bias=_readable(weights.gate_up_bias, x),
        down_bias=_readable(weights.down_bias, x),
        quant_weights=None if config.quant is None else weights.quant,
        adapter_ids=adapter_ids,
        lora=weights.lora,
        intermediate_size=config.intermediate_size,
        transposed=config.weight_layout == "out_in",
        interleaved=config.gate_up_layout == "interleaved",
        quant="" if config.quant is None else config.quant.json,
        invariant=config.batch_invariant,
        activation=as_activation(config.activation),
    )


def _readable(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """A bias as the kernels read it: in the dtype of x, or in the one that they add up in."""
    if bias is None or bias.dtype == x.dtype or bias.dtype == (wide := accumulation_dtype(x.dtype)):
        return bias
    return bias.to(wide)


def with_floats(arguments: RoutedExpertsArguments, weights: MoEWeights) -> RoutedExpertsArguments:
    """The arguments with other gate_up and down, which are plain floats."""
    return arguments._replace(gate_up=weights.gate_up, down=weights.down, quant_weights=None, quant="")


def unpacked(arguments: RoutedExpertsArguments) -> tuple[MoEConfig, MoEWeights, Tensor, Routing]:
    """What `packed` was given."""
    a = arguments
    config = _config_of(
        num_experts=int(a.gate_up.shape[0]),
        top_k=int(a.expert_ids.shape[1]),
        hidden=int(a.x.shape[1]),
        intermediate=a.intermediate_size,
        transposed=a.transposed,
        interleaved=a.interleaved,
        quant=a.quant,
        invariant=a.invariant,
        activation=a.activation,
        adapters=_adapters(a.lora),
    )
    weights = MoEWeights(
        gate_up=a.gate_up,
        down=a.down,
        gate_up_bias=a.gate_up_bias,
        down_bias=a.down_bias,
        quant=a.quant_weights,
        lora=a.lora,
    )
    return config, weights, a.x, Routing(expert_ids=a.expert_ids, weights=a.expert_weights, adapter_ids=a.adapter_ids)


def _adapters(lora: LoRAWeights | None) -> int:
    """The number of adapters."""
    a = None if lora is None else lora.gate_up_a if lora.gate_up_a is not None else lora.down_a
    return 0 if a is None else int(a.shape[0])


@functools.lru_cache
def _config_of(
    *,
    num_experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    transposed: bool,
    interleaved: bool,
    quant: str,
    invariant: bool,
    activation: ActivationConfig,
    adapters: int,
) -> MoEConfig:
    """The config, as far as the op's arguments say it."""
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        zero_experts=padding_experts(num_experts, top_k),
        hidden_size=hidden,
        intermediate_size=intermediate,
        activation=activation,
        gate_up_layout="interleaved" if interleaved else "packed",
        weight_layout="out_in" if transposed else "in_out",
        quant=quant_of_json(quant) if quant else None,
        batch_invariant=invariant,
        lora=LoRAConfig(num_adapters=adapters) if adapters else None,  # stages read sizes from the tensors
    )
