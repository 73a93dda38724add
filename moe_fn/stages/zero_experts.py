"""zero_experts: the contribution of experts without matrices: identity, zero and constant experts."""

import torch
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.numerics import accumulation_dtype
from moe_fn.ops.arithmetic import ARITHMETIC
from moe_fn.ops.dense import dense_product
from moe_fn.records import MoEWeights, Routing


def zero_experts(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing, y: Tensor) -> Tensor:
    """Adds the contribution of ids num_experts .. num_choices - 1, after all sums over ranks and the cut of padding.

        y[t] += sum over those slots of  w * x[t] ("identity"), w * constants[id - num_experts] ("constant"), or 0
                                         ("zero")

    x, y [tokens, H] -> [tokens, H] in y.dtype, computed in float32. Returns y itself without zero experts.

    Laws
        Identity experts add their weight times the input.
        Zero experts cost nothing and add nothing.
        Constant experts add their weight times their vector.

    Source: LongCat-Flash (arXiv 2509.01322), MoE++ (2410.07348), MoNE.

    >>> from moe_fn.config import ZeroExpertsConfig
    >>> config = MoEConfig(num_experts=1, top_k=1, hidden_size=1, intermediate_size=1,
    ...     zero_experts=ZeroExpertsConfig(count=1))
    >>> weights = MoEWeights(gate_up=torch.zeros(1, 2, 1), down=torch.zeros(1, 1, 1))
    >>> routing = Routing(expert_ids=torch.tensor([[1], [0]]), weights=torch.tensor([[0.5], [0.5]]))
    >>> zero_experts(config, weights, torch.tensor([[4.0], [4.0]]), routing, torch.zeros(2, 1)).flatten().tolist()
    [2.0, 0.0]
    """
    zero = config.zero_experts
    if zero is None or zero.kind == "zero":
        return y
    wide = accumulation_dtype(y.dtype)
    number = routing.expert_ids - config.num_experts
    is_zero_expert = (number >= 0) & (number < zero.count)
    w = torch.where(is_zero_expert, routing.weights.to(wide), 0)
    if zero.kind == "identity" or weights.constants is None:
        arithmetic = ARITHMETIC[config.batch_invariant]
        return (y.to(wide) + arithmetic.expand_rows(arithmetic.row_sum(w), x.shape[-1]) * x.to(wide)).to(y.dtype)
    # A matrix [tokens, count] of weights times the vectors: the gradient is a product too, without a scatter.
    chosen = number.unsqueeze(-1) == torch.arange(zero.count, device=number.device)
    per_vector = ARITHMETIC[config.batch_invariant].sum_dim(torch.where(chosen, w.unsqueeze(-1), 0), -2)
    return (y.to(wide) + dense_product(config, per_vector, weights.constants.to(wide).t())).to(y.dtype)
