"""shared_experts: the dense experts that every token visits."""

import torch
from torch import Tensor

from moe_fn.activations import activate
from moe_fn.config import MoEConfig, SharedExpertsConfig, as_activation
from moe_fn.numerics import accumulation_dtype
from moe_fn.records import Routing, SharedWeights


def shared_experts(config: MoEConfig, shared: SharedExpertsConfig, weights: SharedWeights, x: Tensor, routing: Routing) -> Tensor:
    """A dense network beside the routed one, on the original x.

        y = down @ (gamma * activation(gate_up @ x + gate_up_bias)) + down_bias;   y *= sigmoid(x . gate)  if gated

    gamma are the router's weights of the shared experts (gate="router"), else absent. x [tokens, H] -> [tokens, H] in x.dtype.

    Laws
        Shared experts see the original input.
        Shared experts side by side are the sum of single ones.

    Source: DeepSeekMoE (arXiv 2401.06066); the sigmoid gate Qwen2-MoE; router-weighted ones Inkling.

    >>> shared = SharedExpertsConfig(intermediate_size=1, activation="relu_no_mul")
    >>> config = MoEConfig(num_experts=1, top_k=1, hidden_size=1, intermediate_size=1, shared=shared)
    >>> nobody = Routing(expert_ids=torch.full((2, 1), -1), weights=torch.zeros(2, 1))
    >>> weights = SharedWeights(gate_up=torch.tensor([[2.0]]), down=torch.tensor([[3.0]]))
    >>> shared_experts(config, shared, weights, torch.tensor([[1.0], [-1.0]]), nobody).flatten().tolist()
    [6.0, 0.0]
    """
    wide = accumulation_dtype(x.dtype)
    hidden = (x @ weights.gate_up.t()).to(wide)
    if weights.gate_up_bias is not None:
        hidden = hidden + weights.gate_up_bias
    hidden = activate(as_activation(shared.activation), hidden)
    if shared.gate == "router" and routing.shared_weights is not None:
        hidden = (hidden.unflatten(-1, (shared.count, -1)) * routing.shared_weights.to(wide).unsqueeze(-1)).flatten(-2)
    y = hidden.to(x.dtype) @ weights.down.t()
    if weights.down_bias is not None:
        y = y + weights.down_bias
    if shared.gate == "sigmoid" and weights.gate is not None:
        y = (y.to(wide) * torch.sigmoid(x.to(wide) @ weights.gate.to(wide).t())).to(x.dtype)
    return y
