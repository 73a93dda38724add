"""Gradients of a problem: the layer's compared with the reference's."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import moe_fn
from moe_fn.testing import MoEProblem

# Tolerances of the relative RMS error of a gradient, of a size of 0.1 at least. There is no error bound of gradients.
GRADIENT_TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.3, torch.float16: 0.1}
_LEAST_SIZE = 0.1


def gradient_error(problem: MoEProblem) -> float | None:
    """Returns the largest relative RMS error of the gradients of x, logits and every weight that is not a code, or None
    if there are no gradients.
    """
    direction = torch.randn(problem.x.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    ours, theirs = (
        _gradients(problem, function, direction) for function in (moe_fn.moe_forward, moe_fn.reference.moe_forward)
    )
    errors = [_error(a, e.to(torch.float64)) for a, e in zip(ours, theirs, strict=True) if a.numel()]
    return max(errors, default=None)


def _error(actual: Tensor, expected: Tensor) -> float:
    finite = torch.isfinite(expected)  # NaN in padding has no defined derivative
    difference, size = (actual.to(torch.float64) - expected)[finite], expected[finite]
    if not size.numel():
        return 0.0
    return float(difference.square().mean().sqrt()) / max(float(size.square().mean().sqrt()), _LEAST_SIZE)


def _gradients(problem: MoEProblem, function: Callable[..., Tensor], direction: Tensor) -> list[Tensor]:
    problem = _with_leaves(problem)
    inputs = [
        t
        for t in tree_leaves((problem.weights, problem.x, problem.logits))
        if isinstance(t, Tensor) and t.requires_grad
    ]
    total = (problem.call(function).to(torch.float64) * direction).sum()
    found = torch.autograd.grad(total, inputs, allow_unused=True) if total.requires_grad else [None] * len(inputs)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]


def _with_leaves(problem: MoEProblem) -> MoEProblem:
    """Returns the problem with floats that require gradients, except those of quantized weights."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

    def leaf(t: Any) -> Any:
        return t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.dtype in dtypes else t

    weights, x, logits = tree_map(leaf, (problem.weights, problem.x, problem.logits))
    if problem.weights.quant is not None:
        weights = dataclasses.replace(weights, quant=problem.weights.quant)
    return problem.replace(weights=weights, x=x, logits=logits)
