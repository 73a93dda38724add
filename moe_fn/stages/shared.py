"""shared_experts: the dense experts that every token has."""

from torch import Tensor

from moe_fn.config import MoEConfig, as_activation
from moe_fn.numerics import accumulation_dtype
from moe_fn.ops.arithmetic import ARITHMETIC
from moe_fn.ops.dense import dense_product
from moe_fn.records import MoEWeights, Routing
from moe_fn.stages._activation import activate


def shared_experts(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> Tensor | None:
    """Applies the shared experts, a dense network, to the original x.

        y = down @ (gamma * activation(gate_up @ x + gate_up_bias)) + down_bias;   y *= sigmoid(x . gate)  if gated

    With gate="router", gamma is the router's weight of each shared expert, otherwise 1. x [tokens, H] -> [tokens, H] in
    x.dtype; None if the config has no shared experts.

    Laws
        Shared experts see the original input.
        Several shared experts are the sum of single ones.

    Source: DeepSeekMoE (arXiv 2401.06066); the sigmoid gate Qwen2-MoE; router-weighted ones Inkling.

    >>> import torch
    >>> from moe_fn import SharedExpertsConfig, SharedWeights
    >>> shared = SharedExpertsConfig(intermediate_size=1, activation="relu_no_mul")
    >>> config = MoEConfig(num_experts=1, top_k=1, hidden_size=1, intermediate_size=1, shared=shared)
    >>> routing = Routing(expert_ids=torch.full((2, 1), -1), weights=torch.zeros(2, 1))
    >>> dense = SharedWeights(gate_up=torch.tensor([[2.0]]), down=torch.tensor([[3.0]]))
    >>> weights = MoEWeights(gate_up=torch.zeros(1, 2, 1), down=torch.zeros(1, 1, 1), shared=dense)
    >>> shared_experts(config, weights, torch.tensor([[1.0], [-1.0]]), routing).flatten().tolist()
    [6.0, 0.0]
    """
    shared, dense = config.shared, weights.shared
    if shared is None or dense is None:
        return None
    wide, arithmetic = accumulation_dtype(x.dtype), ARITHMETIC[config.batch_invariant]
    hidden = dense_product(config, x, dense.gate_up).to(wide)
    if dense.gate_up_bias is not None:
        hidden = hidden + dense.gate_up_bias
    hidden = activate(as_activation(shared.activation), hidden, arithmetic=arithmetic)
    if shared.gate == "router" and routing.shared_weights is not None:
        by_expert = hidden.unflatten(-1, (shared.count, -1))
        hidden = (
            by_expert * arithmetic.expand_rows(routing.shared_weights.to(wide).unsqueeze(-1), by_expert.shape[-1])
        ).flatten(-2)
    y = dense_product(config, hidden.to(x.dtype), dense.down)
    if dense.down_bias is not None:
        y = y + dense.down_bias
    if shared.gate == "sigmoid" and dense.gate is not None:
        gate = arithmetic.sigmoid(dense_product(config, x.to(wide), dense.gate.to(wide)))
        y = (y.to(wide) * arithmetic.expand_rows(gate, y.shape[-1])).to(x.dtype)
    return y
