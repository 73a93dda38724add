"""experts: two products for each row with the matrices of its expert, and an activation between them."""

import torch
from torch import Tensor

from moe_fn.backends import backend_of
from moe_fn.config import ActivationQuantConfig, ExpertNormConfig, MoEConfig, as_activation
from moe_fn.numerics import accumulation_dtype
from moe_fn.ops.arithmetic import ARITHMETIC, rms_norm
from moe_fn.ops.grouped_matmul import GROUPED, spread_over_rows
from moe_fn.ops.quantized_matmul import quantized_matmul
from moe_fn.ops.rows import has_expert
from moe_fn.quant.codes import codes_of
from moe_fn.quant.inputs import rounded_rows, straight_through
from moe_fn.quant.tiles import halves_of
from moe_fn.records import Dispatched, MoEWeights
from moe_fn.stages._activation import activate
from moe_fn.stages._adapters import ByAdapter, add_adapters, sort_by_adapter
from moe_fn.stages._checks import check_experts
from moe_fn.weights.prepare import _restore_weights


def experts(config: MoEConfig, weights: MoEWeights, dispatched: Dispatched) -> Tensor:
    """Applies to each row the two-layer network of its expert.

        rows[r] = down[e] @ activation(gate_up[e] @ rows[r] + gate_up_bias[e]) + down_bias[e],  e the expert of row r

    dispatched.rows [R, Hx] -> [R, Hx] in the same dtype. Products accumulate in float32 and round once; biases and the
    activation are computed in float32. Rows of no expert are never read. With expert_norm the output is normalized.
    Reads only `rows`, `expert_ends` and, with config.lora, `adapter_of_row`, so rows may come from another dispatch.
    With config.lora each matrix W[e] is W[e] + B[l, e] A[l, e], l the adapter of row r. With config.quant weights are
    dequantized, and the inputs of both products (not of adapters) are rounded as in config.quant.activations, with
    straight-through gradients.

    Laws
        A row depends on its own expert alone.
        Rows of no expert are never read.
        Both weight layouts give the same numbers.
        Packed and interleaved weights give the same numbers.
        Zero biases change nothing.

    Source: SwiGLU experts, Shazeer 2020 (arXiv 2002.05202); grouped products as in MegaBlocks (2211.15841).

    >>> config = MoEConfig(num_experts=2, top_k=1, hidden_size=1, intermediate_size=1, activation="relu_no_mul")
    >>> weights = MoEWeights(gate_up=torch.tensor([[[1.0]], [[2.0]]]), down=torch.ones(2, 1, 1))
    >>> order = torch.tensor([0, 1])
    >>> rows = Dispatched(rows=torch.ones(2, 1), expert_ends=torch.tensor([1, 2], dtype=torch.int32), slot_of_row=order,
    ...     row_of_slot=order)
    >>> experts(config, weights, rows).flatten().tolist()
    [1.0, 2.0]
    """
    check_experts(config, weights, dispatched)
    return _experts(config, weights, dispatched)


def _experts(config: MoEConfig, weights: MoEWeights, dispatched: Dispatched) -> Tensor:
    rows, ends = dispatched.rows, dispatched.expert_ends
    backend, weights = backend_of(config, rows), _restore_weights(config, weights)
    by_adapter = sort_by_adapter(config, dispatched)
    hidden = hidden_rows(config, weights, dispatched, by_adapter)
    out = add_adapters(
        by_adapter, weights.lora, "down", hidden, _product(config, weights, "down", hidden, ends, backend)
    )
    if weights.down_bias is not None:
        out = out.to(accumulation_dtype(rows.dtype)) + spread_over_rows(backend, weights.down_bias, ends, rows.shape[0])
    out = out.to(rows.dtype)
    if config.expert_norm is not None and weights.expert_norm is not None:
        out = _normalize(
            config, config.expert_norm, out, spread_over_rows(backend, weights.expert_norm, ends, rows.shape[0])
        )
    return out


def hidden_rows(config: MoEConfig, weights: MoEWeights, dispatched: Dispatched, by_adapter: ByAdapter | None) -> Tensor:
    """Returns the intermediates, the inputs of down: [R, Hx] -> [R, I] in the dtype of the rows. Weights are not
    prepared.
    """
    rows, ends, backend = dispatched.rows, dispatched.expert_ends, backend_of(config, dispatched.rows)
    hidden = _product(config, weights, "gate_up", rows, ends, backend).to(accumulation_dtype(rows.dtype))
    hidden = add_adapters(by_adapter, weights.lora, "gate_up", rows, hidden)
    if weights.gate_up_bias is not None:
        hidden = hidden + spread_over_rows(backend, weights.gate_up_bias, ends, rows.shape[0])
    return activate(
        as_activation(config.activation), hidden, config.gate_up_layout, ARITHMETIC[config.batch_invariant]
    ).to(rows.dtype)


def _product(config: MoEConfig, weights: MoEWeights, name: str, rows: Tensor, ends: Tensor, backend: str) -> Tensor:
    """Product of rows with their experts' gate_up or down, which are floats or codes."""
    if config.quant is None:
        return GROUPED[backend].matmul(
            rows, getattr(weights, name), ends, config.weight_layout == "out_in", invariant=config.batch_invariant
        )
    if config.quant.activations is not None:
        rows = _rounded(config.quant.activations, weights, name, rows, ends, backend)
    halves, invariant = halves_of(config, name), config.batch_invariant
    return quantized_matmul(backend, rows, codes_of(weights, name), ends, config.quant, halves, invariant=invariant)


def _rounded(
    a: ActivationQuantConfig, weights: MoEWeights, name: str, rows: Tensor, ends: Tensor, backend: str
) -> Tensor:
    """Returns rows quantized and dequantized, with a straight-through gradient."""
    static = None if weights.quant is None else getattr(weights.quant, f"{name}_input_scale")
    if static is not None:
        static = spread_over_rows(backend, static.to(torch.float32).unsqueeze(-1), ends, rows.shape[0])
    present = has_expert(rows.shape[0], ends)
    return straight_through(rounded_rows(a, rows.detach(), present, static).floats().to(rows.dtype), rows)


def _normalize(config: MoEConfig, norm: ExpertNormConfig, rows: Tensor, scale: Tensor) -> Tensor:
    wide = rows.to(accumulation_dtype(rows.dtype))
    if norm.scale == "before":
        wide = wide * scale
    return rms_norm(config, wide, scale if norm.scale == "after" else None, norm.epsilon).to(rows.dtype)
