"""Contestant triton_kernels by OpenAI: experts by its grouped products, in each version of its interface.

The package is in Triton's repository and in vLLM's package. Versions:

    3.5    routing(logits, k, expt_indx=ids), matmul_ogs
    3.6    topk(logits, k, y_indx=ids), matmul_ogs
    later  topk, matmul

Its own kernels sort the slots: topk gets the ids and does the rest of its work. Its fused activation is gate *
sigmoid(alpha gate) * (up + 1) with interleaved gates and ups; for silu a bias of -1, in float32, cancels the 1, and
alpha is 1.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moe_fn.bench.contestants.entry import Contestant, Layer, Run, activation_name, interleaved, missing
from moe_fn.bench.contestants.on_gpu import GPU, refuses_of_library
from moe_fn.bench.contestants.routers import routing_of
from moe_fn.bench.problem import Problem, TokenInput

_NAMES = ("triton_kernels", "vllm.third_party.triton_kernels")
_ALPHA_AND_LIMIT = {"silu": (1.0, float("inf")), "swigluoai": (1.702, 7.0)}


def _installed() -> str | None:
    return None if any(missing(name) is None for name in _NAMES) else missing(*_NAMES)


def _module(name: str) -> ModuleType:
    if missing("triton_kernels") is not None:  # its files import each other by that name
        sys.modules["triton_kernels"] = importlib.import_module(_NAMES[1])
    return importlib.import_module(f"triton_kernels.{name}")


def _in_out(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Interleaved gate_up [E, H, 2 I], down [E, I, H] and their biases in float32."""
    config, weights = problem.config, problem.weights
    transposed = config.weight_layout == "out_in"
    rows = weights.gate_up if transposed else weights.gate_up.transpose(1, 2)
    bias = weights.gate_up_bias
    if bias is None:
        bias = rows.new_zeros(rows.shape[:2])
    if config.gate_up_layout == "packed":
        rows, bias = interleaved(rows), interleaved(bias)
    bias = bias.to(torch.float32, copy=True)
    if activation_name(config) == "silu":
        bias[:, 1::2] -= 1
    down_bias = None if weights.down_bias is None else weights.down_bias.float()
    down = weights.down.transpose(1, 2) if transposed else weights.down
    return rows.transpose(1, 2), down, bias, down_bias


def _act(module: ModuleType, problem: Problem) -> Any:
    function, arguments = _module("swiglu").swiglu_fn, _ALPHA_AND_LIMIT[activation_name(problem.config) or ""]
    try:
        return module.FusedActivation(module.FnSpecs("swiglu", function, ("alpha", "limit"), reduction_n=2), arguments)
    except TypeError:  # 3.5
        return module.FusedActivation(module.FnSpecs("swiglu", function, ("alpha", "limit")), arguments, 2)


class _ByMatmul:
    """The interface after 3.6."""

    def __init__(self, problem: Problem) -> None:
        self.matmul, self.topk = _module("matmul"), _module("topk").topk
        self.ragged, self.reduce = _module("tensor").make_ragged_tensor_metadata, _module("reduce").reduce
        self.weights, self.act = _in_out(problem), _act(self.matmul, problem)

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, logits: Tensor) -> Tensor:
        gate_up, down, gate_up_bias, down_bias = self.weights
        top_k, sorted_ = ids.shape[1], self.topk(logits, ids.shape[1], y_indx=ids).mask_metadata
        slot_of_row = sorted_.col_sorted_indx
        rows = self.ragged(sorted_.col_sum, ids.numel())
        hidden = self.matmul.matmul(
            x,
            gate_up,
            gate_up_bias,
            a_ragged_metadata=rows,
            gather_indx=slot_of_row // top_k,
            fused_activation=self.act,
        )
        y = self.matmul.matmul(
            hidden,
            down,
            down_bias,
            a_ragged_metadata=rows,
            scatter_indx=slot_of_row,
            gammas=weights.flatten()[slot_of_row],
        )
        total: Tensor = self.reduce(y.view(len(x), top_k, -1), dim=1)[0]
        return total


class _ByMatmulOgs:
    """The interface of 3.5 and 3.6."""

    def __init__(self, problem: Problem) -> None:
        self.ogs, self.tensor = _module("matmul_ogs"), _module("tensor")
        self.weights, self.act = _in_out(problem), _act(self.ogs, problem)
        self.sort = self._sorted if hasattr(self.tensor, "SparseMatrix") else _module("routing").routing

    def _sorted(self, logits: Tensor, top_k: int, expt_indx: Tensor) -> tuple[Any, Any, Any]:
        sparse = _module("topk").topk(logits, top_k, y_indx=expt_indx)
        found = sparse.mask_metadata
        row_of_slot, slot_of_row = found.row_sorted_indx, found.col_sorted_indx
        rows = self.tensor.make_ragged_tensor_metadata(found.col_sum, len(row_of_slot))
        data = self.ogs.RoutingData(sparse.vals.flatten()[slot_of_row], found.col_sum, logits.shape[1], top_k, rows)
        return data, self.ogs.GatherIndx(slot_of_row, row_of_slot), self.ogs.ScatterIndx(row_of_slot, slot_of_row)

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, logits: Tensor) -> Tensor:
        gate_up, down, gate_up_bias, down_bias = self.weights
        data, gather, scatter = self.sort(logits, ids.shape[1], expt_indx=ids)
        matmul, gammas = self.ogs.matmul_ogs, weights.flatten()[gather.src_indx]
        hidden = matmul(x, gate_up, gate_up_bias, data, gather_indx=gather, fused_activation=self.act)
        y: Tensor = matmul(
            hidden.view(-1, hidden.shape[-1]), down, down_bias, data, scatter_indx=scatter, gammas=gammas
        )
        return y.view(len(x), -1)


def _build(problem: Problem) -> Layer:
    _module("swiglu")  # makes the package known by its name
    experts = _ByMatmul(problem) if missing("triton_kernels.matmul_ogs") is not None else _ByMatmulOgs(problem)

    def whole(token_input: TokenInput) -> Tensor:
        routing = routing_of(problem, token_input)
        return experts(token_input.x, routing.expert_ids.to(torch.int16), routing.weights, token_input.logits)

    def bind(token_input: TokenInput) -> Run:
        ids, routing = token_input.routing.expert_ids.to(torch.int16), token_input.routing
        if problem.part == "layer":
            return lambda: whole(token_input)
        return lambda: experts(token_input.x, ids, routing.weights, token_input.logits)

    return Layer(bind=bind)


def _refuses(problem: Problem, tokens: int) -> str | None:
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return "supports dtypes of 16 bits and fewer"
    if problem.config.top_k & (problem.config.top_k - 1):
        return f"sorts a power of 2 of choices, not {problem.config.top_k}"
    return refuses_of_library(problem, tuple(_ALPHA_AND_LIMIT), biases=True, gradients=False)


TRITON_KERNELS = Contestant(
    name="triton_kernels", installed=_installed, refuses=_refuses, build=_build, copies=1, devices=GPU
)
