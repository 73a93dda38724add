"""Laws of the campaign: other calls that must give the same output, each compared with the same bound."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import moe_fn
from moe_fn.kernels.native import support
from moe_fn.testing import MoEProblem


@dataclass(frozen=True)
class Law:
    """A function that computes the output of a problem in another way, when it applies, and when bits must be equal."""

    output: Callable[[MoEProblem], Tensor]
    applies: Callable[[MoEProblem], bool] = lambda problem: True
    exact: Callable[[MoEProblem], bool] = lambda problem: False


def forward(problem: MoEProblem) -> Tensor:
    """Returns the layer's output for a problem."""
    y: Tensor = problem.call(moe_fn.moe_forward)
    return y


def _tokens(problem: MoEProblem) -> Tensor:
    return torch.arange(problem.x[..., 0].numel())


def _permuted(problem: MoEProblem) -> Tensor:
    order = _tokens(problem).flip(0).roll(1)
    return forward(problem.of_tokens(order))[order.argsort()].view(problem.x.shape)


def _split(problem: MoEProblem) -> Tensor:
    tokens = _tokens(problem)
    cut = len(tokens) // 3
    return torch.cat([forward(problem.of_tokens(part)) for part in (tokens[:cut], tokens[cut:])]).view(problem.x.shape)


def _padded(problem: MoEProblem) -> Tensor:
    """Appends two tokens of padding, with NaN and infinity."""
    flat, count = problem.of_tokens(_tokens(problem)), problem.x[..., 0].numel()
    mask = torch.ones(count, dtype=torch.bool) if flat.token_mask is None else flat.token_mask
    ids, adapters = (None if t is None else torch.cat([t, t.new_zeros(2)]) for t in (flat.token_ids, flat.adapter_ids))
    longer = flat.replace(
        x=_with_garbage(flat.x),
        logits=None if flat.logits is None else _with_garbage(flat.logits),
        token_mask=torch.cat([mask, mask.new_zeros(2)]),
        token_ids=ids,
        adapter_ids=adapters,
    )
    return forward(longer)[:count].view(problem.x.shape)


def _with_garbage(rows: Tensor) -> Tensor:
    return torch.cat([rows, *(rows.new_full((1, rows.shape[-1]), garbage) for garbage in (torch.nan, torch.inf))])


def _chunked(problem: MoEProblem) -> Tensor:
    return forward(problem.with_config(chunk_tokens=3 if problem.config.chunk_tokens is None else None))


def _opaque(problem: MoEProblem) -> Tensor:
    return forward(problem.with_config(opaque=not problem.config.opaque))


def _prepared(problem: MoEProblem) -> Tensor:
    return forward(problem.replace(weights=moe_fn.prepare_weights(problem.config, problem.weights)))


def _in_torch(problem: MoEProblem) -> Tensor:
    return forward(problem.with_config(backend="torch" if problem.config.backend == "auto" else "auto"))


def _routed(problem: MoEProblem) -> Tensor:
    _, routing = problem.call(moe_fn.moe_route)
    y: Tensor = moe_fn.moe_forward_routed(
        problem.config, problem.weights, problem.x, routing, token_mask=problem.token_mask
    )
    return y


def _with_stats(problem: MoEProblem) -> Tensor:
    y: Tensor = problem.call(moe_fn.moe_forward_with_stats)[0]
    return y


def _tokens_are_independent(problem: MoEProblem) -> bool:
    """Whether a token's output does not depend on other tokens; a capacity is shared by a sequence."""
    return problem.config.router.capacity is None


def _without_scale_of_call(problem: MoEProblem) -> bool:
    return problem.config.quant is None or not problem.config.quant.rounds_by_call


def _invariant(problem: MoEProblem) -> bool:
    return problem.config.batch_invariant


def _has_panels(problem: MoEProblem) -> bool:
    return problem.x.dtype in support.DTYPES and problem.config.backend == "auto" and problem.config.lora is None


LAWS: dict[str, Law] = {
    "permuting tokens": Law(_permuted, _tokens_are_independent, exact=_invariant),
    "splitting the batch": Law(
        _split, lambda problem: _tokens_are_independent(problem) and _without_scale_of_call(problem), _invariant
    ),
    "padding": Law(_padded, _tokens_are_independent, exact=_invariant),
    "other chunks": Law(_chunked, _without_scale_of_call, exact=_invariant),
    "opaque or not": Law(_opaque, exact=_invariant),
    "prepared weights": Law(_prepared, _has_panels),
    "other back-end": Law(_in_torch),
    "router apart": Law(_routed),
    "with statistics": Law(_with_stats, exact=_invariant),
    "again": Law(forward, exact=lambda problem: True),
}


def laws_of(index: int) -> tuple[str, ...]:
    """Returns half of the laws, which alternates with the index."""
    return tuple(name for place, name in enumerate(LAWS) if (index + place) % 2 == 0)
