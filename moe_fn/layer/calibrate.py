"""calibrate: statistics of the experts' inputs over some tokens, for quantizing their weights and for static scales of
their inputs.
"""

import torch
from torch import Tensor

from moe_fn.checks import check_kind, check_per_token
from moe_fn.config import MoEConfig
from moe_fn.layer.compose import route_tokens
from moe_fn.ops.rows import count_up_to
from moe_fn.quant.calibration import Calibration
from moe_fn.records import MoEWeights
from moe_fn.stages._checks import check_token_inputs, check_x
from moe_fn.stages.dispatch import dispatch
from moe_fn.stages.experts import hidden_rows
from moe_fn.stages.transform import transform_input
from moe_fn.weights.check import check_layer, check_weights
from moe_fn.weights.prepare import restore_weights


@torch.no_grad()
def calibrate(config: MoEConfig, weights: MoEWeights, x: Tensor, logits: Tensor | None = None) -> Calibration:
    """Returns mean squares and largest magnitudes of the inputs of each expert's gate_up and down, over tokens of x.

        gate_up_mean_square[e, k] = mean over rows r of expert e of  rows[r, k]^2

    An expert without rows gets the mean of all rows.

    x [T, H] floats, the input of the layer, logits as in moe_forward; weights are floats. `quantize_weights` then gives
    errors of weights with large inputs more weight, and chooses static scales that cover these inputs.

    Raises ValueError for quantized weights, for adapters, and for x without tokens.

    Source: the importance matrix of llama.cpp; the diagonal of GPTQ's Hessian (arXiv 2210.17323).

    >>> config = MoEConfig(num_experts=2, top_k=1, hidden_size=2, intermediate_size=1, activation="relu_no_mul")
    >>> weights = MoEWeights(gate_up=torch.ones(2, 1, 2), down=torch.ones(2, 2, 1))
    >>> calibrate(config, weights, torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.eye(2)).gate_up_mean_square.tolist()
    [[9.0, 16.0], [0.0, 4.0]]
    """
    check_layer("calibrate", config, weights)
    check_kind("calibrate", "x", x, Tensor)
    if config.quant is not None or config.lora is not None:
        raise ValueError("calibrate: config.quant or config.lora is given; expected None for both, a layer of floats")
    if x.ndim != 2 or not len(x):
        raise ValueError(f"calibrate: x is {list(x.shape)}; expected (tokens, hidden_size) with at least one token")
    check_x("calibrate", config, x)
    if logits is not None:
        check_per_token("calibrate", "logits", logits, x, ("num_logits", config.num_logits), "float")
    check_token_inputs("calibrate", config, x, None, None)
    check_weights("calibrate", config, weights, x)
    _, routing = route_tokens(config, weights, x, logits, None, None)
    d = dispatch(config, transform_input(config, weights, x), routing)
    hidden = hidden_rows(config, restore_weights(config, weights), d, None)
    row = torch.arange(d.rows.shape[0], device=x.device)
    expert = count_up_to(d.expert_ends, row.to(d.expert_ends.dtype))  # num_experts for rows of no expert
    return Calibration(
        *_input_statistics(config.num_experts, d.rows, expert), *_input_statistics(config.num_experts, hidden, expert)
    )


def _input_statistics(experts: int, rows: Tensor, expert: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean squares [E, K] and largest magnitudes [E] of each expert's rows."""
    present = (expert < experts).unsqueeze(1)
    wide = torch.where(present, rows.to(torch.float32), 0)
    bins = experts + 1  # the last for rows of no expert
    counts = torch.zeros(bins, device=rows.device).index_add(0, expert, torch.ones_like(expert, dtype=torch.float32))
    sums = torch.zeros(bins, rows.shape[1], device=rows.device).index_add(0, expert, wide.square())
    overall = sums[:experts].sum(0) / counts[:experts].sum().clamp(min=1)
    means = torch.where(
        counts[:experts].unsqueeze(1) > 0, sums[:experts] / counts[:experts].unsqueeze(1).clamp(min=1), overall
    )
    largest = torch.zeros(bins, device=rows.device).index_reduce(0, expert, wide.abs().amax(1), "amax")[:experts]
    return means, torch.where(counts[:experts] > 0, largest, largest.amax())
