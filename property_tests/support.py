"""Helpers of the laws: the `law` decorator, with which a law can be run again on a planted bug, and functions of
problems.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from hypothesis import example, given
from hypothesis.strategies import SearchStrategy
from torch import Tensor

import moe_fn
from moe_fn import reference
from moe_fn.config import MoEConfig
from moe_fn.records import RouterWeights, Routing
from moe_fn.testing import MoEProblem, assert_matches
from moe_fn.testing.bounds import error_bound


def law(*strategies: SearchStrategy[Any]) -> Callable[[Callable[..., None]], Any]:
    """Makes a Hypothesis test that keeps its check and strategies, so that `test_planted_bugs` can run it on broken
    code.
    """

    def decorate(check: Callable[..., None]) -> Any:
        test = given(*strategies)(check)
        test.check, test.strategies = check, strategies  # type: ignore[attr-defined]
        return test

    return decorate


def on_every(rows: Iterable[Any], *arguments_of: Callable[[Any], tuple[Any, ...]]) -> Callable[[Any], Any]:
    """Adds an example for each row of a table to a Hypothesis test, as 45 draws may miss some of 20 rows."""

    def decorate(test: Any) -> Any:
        for row, arguments in itertools.product(rows, arguments_of):
            test = example(*arguments(row))(test)
        return test

    return decorate


def flat(t: Tensor | None, extra: int = 0) -> Tensor | None:
    """Flattens the token dimensions, which are all but the last `extra` ones."""
    if t is None:
        return None
    return t.reshape(-1, *t.shape[t.ndim - extra :])


def logits_of(problem: MoEProblem) -> Tensor:
    """Returns the problem's logits [T, E], computed by its gate if it has none."""
    logits = problem.logits
    if logits is None:
        call = moe_fn.layer.call.check_and_flatten(
            "test", problem.config, problem.weights, problem.x, None, problem.token_ids, problem.token_mask
        )
        return moe_fn.layer.compose.logits_of_tokens(problem.config, problem.weights, call.x)
    return flat(logits, 1)  # type: ignore[return-value]


def route(problem: MoEProblem, logits: Tensor | None = None, **config_changes: Any) -> Routing:
    """Returns moe_fn.route of a problem, with flattened tokens."""
    config = dataclasses.replace(problem.config, **config_changes)
    logits = logits_of(problem) if logits is None else logits
    ids, mask = flat(problem.token_ids), flat(problem.token_mask)
    return moe_fn.route(
        config, problem.weights, logits, token_ids=ids, token_mask=mask, leading=tuple(problem.x.shape[:-1])
    )


def assert_is_the_layer(problem: MoEProblem, y: Tensor, other: Tensor | None = None, scale: float = 0.1) -> None:
    """Asserts that y equals the reference, or `other` (computed by the layer too), up to the tolerance of its dtype.

    Where terms cancel before a norm, the norm amplifies their rounding errors by up to 1 / sqrt(epsilon) (expert_norm
    followed by latent.output_norm: 100 times), which a tolerance by dtype does not cover. Errors beyond the tolerance
    must be within the bound that running error analysis computes for this problem, and two computations by the layer
    within twice the bound of each other.
    """
    try:
        assert_matches(y, problem.call(reference.moe_forward) if other is None else other, scale=scale)
    except AssertionError:
        bound = error_bound(problem)
        value, radius = (bound.value, bound.radius) if other is None else (other, 2 * bound.radius)
        if not (radius.isfinite() & ((y - value).abs() <= radius)).all():
            raise


def real_tokens(problem: MoEProblem) -> Tensor:
    """Returns bool [tokens]: True for tokens that are not padding."""
    tokens = problem.x[..., 0].numel()
    return torch.ones(tokens, dtype=torch.bool) if problem.token_mask is None else problem.token_mask.flatten()


def router_with(problem: MoEProblem, **changes: Any) -> MoEProblem:
    """Returns the problem with other router weights."""
    router = dataclasses.replace(problem.weights.router or RouterWeights(), **changes)
    return problem.replace(weights=dataclasses.replace(problem.weights, router=router))


def config_with(problem: MoEProblem, **changes: Any) -> MoEProblem:
    """Returns the problem with changes of its config; names of RouterConfig fields change the router."""
    own = {f.name for f in dataclasses.fields(MoEConfig)}
    router = dataclasses.replace(problem.config.router, **{k: v for k, v in changes.items() if k not in own})
    return problem.with_config(router=router, **{k: v for k, v in changes.items() if k in own})


def leaves(*trees: Any) -> list[Tensor]:
    """Returns the floating-point tensors of pytrees."""
    return [t for t in torch.utils._pytree.tree_leaves(trees) if isinstance(t, Tensor) and t.dtype.is_floating_point]


def with_gradients(problem: MoEProblem) -> MoEProblem:
    """Returns a copy whose floating-point tensors are leaves that require grad."""

    def fresh(t: Any) -> Any:
        return t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.dtype.is_floating_point else t

    tree = (problem.weights, problem.x, problem.logits)
    weights, x, logits = torch.utils._pytree.tree_map(fresh, tree)
    return problem.replace(weights=weights, x=x, logits=logits)


def gradients(problem: MoEProblem, function: Callable[..., Tensor], direction: Tensor) -> list[Tensor]:
    """Returns gradients of (function(problem) * direction).sum() to x, logits and every weight; zeros where
    there is none.
    """
    problem = with_gradients(problem)
    inputs = leaves(problem.weights, problem.x, problem.logits)
    total = (problem.call(function).to(torch.float64) * direction).sum()
    if not total.requires_grad:
        return [torch.zeros_like(t) for t in inputs]
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]
