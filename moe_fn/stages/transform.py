"""transform_input and transform_output: to the space that the routed experts work in, and back."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.numerics import accumulation_dtype
from moe_fn.records import MoEWeights


def transform_input(config: MoEConfig, weights: MoEWeights, x: Tensor) -> Tensor:
    """What the routed experts see: the latent projection of x, if there is one, with zeros up to the experts' width.

        v = norm(x @ latent.input.T + latent.input_bias);   [tokens, H] -> [tokens, expert_hidden_size]

    Laws
        Padding the hidden dimension changes nothing.

    >>> config = MoEConfig(num_experts=1, top_k=1, hidden_size=2, intermediate_size=1, hidden_padding=1)
    >>> transform_input(config, MoEWeights(gate_up=torch.zeros(1, 2, 3), down=torch.zeros(1, 3, 1)), torch.ones(1, 2))
    tensor([[1., 1., 0.]])
    """
    latent = weights.latent
    if config.latent is not None and latent is not None:
        x = x @ latent.input.t()
        x = x if latent.input_bias is None else x + latent.input_bias
        x = x if latent.input_norm is None else _rms_norm(x, latent.input_norm, config.latent.norm_epsilon)
    return F.pad(x, (0, config.hidden_padding)) if config.hidden_padding else x


def transform_output(config: MoEConfig, weights: MoEWeights, routed: Tensor) -> Tensor:
    """Back from the latent space: norm(routed) @ latent.output.T + latent.output_bias, [tokens, L] -> [tokens, H].

    Without a latent space, routed as it is.

    Laws
        An identity latent space changes nothing.

    >>> config = MoEConfig(num_experts=1, top_k=1, hidden_size=2, intermediate_size=1)
    >>> transform_output(config, MoEWeights(gate_up=torch.zeros(1, 2, 2), down=torch.zeros(1, 2, 1)), torch.ones(1, 2))
    tensor([[1., 1.]])
    """
    latent = weights.latent
    if config.latent is None or latent is None:
        return routed
    routed = routed if latent.output_norm is None else _rms_norm(routed, latent.output_norm, config.latent.norm_epsilon)
    y = routed @ latent.output.t()
    return y if latent.output_bias is None else y + latent.output_bias


def _rms_norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    wide = x.to(accumulation_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * scale).to(x.dtype)
