"""transform_input, transform_output: norms, latent projections and hidden padding around the routed experts.

Also the norms of the gate's input and of the layer's output.
"""

import torch.nn.functional as F
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.ops.arithmetic import rms_norm
from moe_fn.ops.dense import dense_product
from moe_fn.records import MoEWeights


def transform_input(config: MoEConfig, weights: MoEWeights, x: Tensor) -> Tensor:
    """Returns the input of the routed experts: x after the norm, the latent projection and padding that the config has.

        v = norm(norm(x) @ latent.input.T + latent.input_bias);   [tokens, H] -> [tokens, expert_hidden_size]

    Laws
        Padding the hidden dimension changes nothing.

    >>> import torch
    >>> config = MoEConfig(num_experts=1, top_k=1, hidden_size=2, intermediate_size=1, hidden_padding=1)
    >>> transform_input(config, MoEWeights(gate_up=torch.zeros(1, 2, 3), down=torch.zeros(1, 3, 1)), torch.ones(1, 2))
    tensor([[1., 1., 0.]])
    """
    latent = weights.latent
    if config.norms is not None and config.norms.input:
        x = rms_norm(config, x, weights.input_norm, config.norms.epsilon)
    if config.latent is not None and latent is not None:
        x = dense_product(config, x, latent.input)
        x = x if latent.input_bias is None else x + latent.input_bias
        x = x if latent.input_norm is None else rms_norm(config, x, latent.input_norm, config.latent.norm_epsilon)
    return F.pad(x, (0, config.hidden_padding)) if config.hidden_padding else x


def transform_output(config: MoEConfig, weights: MoEWeights, routed: Tensor) -> Tensor:
    """Projects back from the latent space: norm(routed) @ latent.output.T + latent.output_bias, [tokens, L] ->
    [tokens, H].

    Returns routed itself without a latent space.

    Laws
        An identity latent space changes nothing.

    >>> import torch
    >>> config = MoEConfig(num_experts=1, top_k=1, hidden_size=2, intermediate_size=1)
    >>> transform_output(config, MoEWeights(gate_up=torch.zeros(1, 2, 2), down=torch.zeros(1, 2, 1)), torch.ones(1, 2))
    tensor([[1., 1.]])
    """
    latent = weights.latent
    if config.latent is None or latent is None:
        return routed
    routed = (
        routed
        if latent.output_norm is None
        else rms_norm(config, routed, latent.output_norm, config.latent.norm_epsilon)
    )
    y = dense_product(config, routed, latent.output)
    return y if latent.output_bias is None else y + latent.output_bias


def norm_for_gate(config: MoEConfig, x: Tensor) -> Tensor:
    """Returns the input of the gate inside the layer: RMS norm of x without scale if norms.gate, else x. [tokens, H] ->
    [tokens, H].

    Laws
        A norm for the gate equals a gate on normed inputs.

    Source: Gemma-4.

    >>> import torch
    >>> from moe_fn.config import NormsConfig
    >>> config = MoEConfig(num_experts=1, top_k=1, hidden_size=2, intermediate_size=1,
    ...     norms=NormsConfig(epsilon=0.0, gate=True))
    >>> norm_for_gate(config, torch.tensor([[3.0, 4.0]]))
    tensor([[0.8485, 1.1314]])
    """
    return rms_norm(config, x, None, config.norms.epsilon) if config.norms is not None and config.norms.gate else x


def norm_output(config: MoEConfig, weights: MoEWeights, y: Tensor) -> Tensor:
    """Returns the RMS norm of the layer's output if norms.output, else y. [tokens, H] -> [tokens, H].

    Laws
        Norms around the layer equal the reference.

    Source: A.X-K1 (post_mlp_layernorm).

    >>> import torch
    >>> from moe_fn.config import NormsConfig
    >>> config = MoEConfig(num_experts=1, top_k=1, hidden_size=2, intermediate_size=1,
    ...     norms=NormsConfig(epsilon=0.0, output=True))
    >>> weights = MoEWeights(gate_up=torch.zeros(1, 2, 2), down=torch.zeros(1, 2, 1),
    ...     output_norm=torch.tensor([1.0, 0.5]))
    >>> norm_output(config, weights, torch.tensor([[3.0, 4.0]]))
    tensor([[0.8485, 0.5657]])
    """
    return (
        rms_norm(config, y, weights.output_norm, config.norms.epsilon)
        if config.norms is not None and config.norms.output
        else y
    )
