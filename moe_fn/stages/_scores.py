"""The choice of experts: tables of score functions and selection functions. A new function is one row."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_fn.config import GroupConfig, MoEConfig, RouterConfig
from moe_fn.numerics import accumulation_dtype, root
from moe_fn.ops.arithmetic import ARITHMETIC, Arithmetic
from moe_fn.records import RouterWeights
from moe_fn.torch_compat import constant_while_tracing, transforms_active

SCORES: dict[str, Callable[[Arithmetic, Tensor], Tensor]] = {
    "softmax": lambda m, z: m.softmax(z),
    "sigmoid": lambda m, z: m.sigmoid(z),
    "sqrtsoftplus": lambda m, z: root(m.softplus(z)),  # softplus(z) is 0 in float32 for z < -104
    "identity": lambda m, z: z,
}


def scores_of(config: MoEConfig, z: Tensor) -> Tensor:
    """Returns the scores of transformed logits, 0 where a score is NaN or infinite."""
    return finite(SCORES[config.router.scoring](ARITHMETIC[config.batch_invariant], z))


def transformed_logits(config: MoEConfig, logits: Tensor) -> Tensor:
    """Returns logits in the dtype of scores, times logit_multiplier, soft-capped."""
    router = config.router
    z = logits.to(accumulation_dtype(logits.dtype)) if router.score_dtype == "float32" else logits
    if router.logit_multiplier != 1.0:
        z = z * router.logit_multiplier
    if router.logit_softcap is not None:
        z = router.logit_softcap * ARITHMETIC[config.batch_invariant].tanh(z / router.logit_softcap)
    return z


def finite(scores: Tensor) -> Tensor:
    """Returns the scores with 0 for NaN and infinity."""
    return torch.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0)


def _best(values: Tensor, count: int) -> Tensor:
    """Returns the indices of the `count` largest values, descending, ties to the lowest index.

    torch.topk does not define the order of ties, so it runs on distinct int64 keys: the upper half is the value's bits,
    mapped to integers of the same order, the lower half is the index counted from the end. A stable sort, for float64
    whose bits fill the key, takes five times as long: 2.5 ms for 1024 tokens of 128 experts.
    """
    if values.dtype == torch.float64 or not _can_view_as_integers():
        return values.sort(dim=-1, descending=True, stable=True).indices.narrow(-1, 0, count)
    bits = (values.to(torch.float32) + 0.0).view(torch.int32)  # + 0: -0 is as large as 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    from_the_end = torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)
    best: Tensor = ((ordered << 32) + from_the_end).topk(count, -1).indices
    return best


# Before torch 2.13 Tensor.view(dtype) has no batching rule.
_VIEW_HAS_VMAP = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


@constant_while_tracing
def _can_view_as_integers() -> bool:
    """Whether floats may be viewed as integers under the active transforms; if not, `_best` sorts."""
    return _VIEW_HAS_VMAP or not transforms_active()


def _candidates(values: Tensor) -> Tensor:
    """Returns selection values without gradient. NaN and infinity become the lowest finite number; masks are -inf."""
    lowest = torch.finfo(values.dtype).min
    return torch.nan_to_num(values.detach(), nan=lowest, posinf=lowest, neginf=lowest)


def _with_bias(router: RouterConfig, extra: RouterWeights, kind: str, values: Tensor) -> Tensor:
    if router.correction_bias != kind or extra.correction_bias is None:
        return values
    return values.to(accumulation_dtype(values.dtype)) + extra.correction_bias


def _top_k(config: MoEConfig, extra: RouterWeights, z: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    values, scores = _values_and_scores(config, extra, z)
    if config.router.groups is not None and config.router.groups.limit == "each":
        ids = _best_of_each_group(config.router.groups, config.top_k, values)
    else:
        ids = _best(values, config.top_k)
    return ids, _weights_of_chosen(config, z, scores, ids)


def top_k_weights(config: MoEConfig, extra: RouterWeights, z: Tensor, ids: Tensor) -> Tensor:
    """Returns the weights of given expert ids, before renormalization."""
    return _weights_of_chosen(config, z, _values_and_scores(config, extra, z)[1], ids)


def weights_of_choice(config: MoEConfig, z: Tensor, ids: Tensor) -> Tensor:
    """Returns the weights, before renormalization, of experts that another run chose: groups are ignored, ids below 0
    get 0.
    """
    missing, known = ids < 0, ids.clamp(min=0)
    if config.router.scoring_order == "after_top_k":
        # Mask missing experts with -inf, except in rows without experts: their softmax gradient would be NaN.
        chosen = torch.where(missing & ~missing.all(-1, keepdim=True), -torch.inf, z.gather(-1, known))
        return torch.where(missing, 0, scores_of(config, chosen))
    return torch.where(missing, 0, scores_of(config, z).gather(-1, known))


def _weights_of_chosen(config: MoEConfig, z: Tensor, scores: Tensor, ids: Tensor) -> Tensor:
    return (
        scores_of(config, z.gather(-1, ids)) if config.router.scoring_order == "after_top_k" else scores.gather(-1, ids)
    )


def _values_and_scores(config: MoEConfig, extra: RouterWeights, z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (selection values without gradient, scores that the routing weights are gathered from)."""
    router = config.router
    after = router.scoring_order == "after_top_k"
    scores = scores_of(config, z) if not after or router.correction_bias == "scores" else z
    if router.correction_bias == "logits" or (after and router.correction_bias == "none"):
        values = _with_bias(router, extra, "logits", z)
    else:
        values = _with_bias(router, extra, "scores", scores)
    values = _candidates(values)
    if router.groups is not None and router.groups.limit == "groups":
        kept = _kept_experts(router.groups, values)
        values = torch.where(kept, values, -torch.inf if router.groups.fill == "-inf" else 0.0)
        if router.correction_bias == "none":
            scores = torch.where(kept, scores, 0)
    return values, scores


def _kept_experts(groups: GroupConfig, values: Tensor) -> Tensor:
    """Returns the mask of experts in the best groups: bool, with the shape of values."""
    by_group = values.unflatten(-1, (groups.count, -1))
    group_scores = (
        by_group.amax(-1)
        if groups.score == "max"
        else by_group.sort(-1, descending=True).values.narrow(-1, 0, 2).sum(-1)
    )
    best = _best(group_scores, groups.top_k)
    kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter(-1, best, torch.ones_like(best, dtype=torch.bool))
    return kept.unsqueeze(-1).expand(by_group.shape).flatten(-2)


def _best_of_each_group(groups: GroupConfig, top_k: int, values: Tensor) -> Tensor:
    by_group = values.unflatten(-1, (groups.count, -1))
    ids = _best(by_group, top_k // groups.count)
    first = torch.arange(groups.count, device=values.device).unsqueeze(-1) * by_group.shape[-1]
    expert_ids: Tensor = ids + first
    return expert_ids.flatten(-2)


def _hash(config: MoEConfig, extra: RouterWeights, z: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    if token_ids is None or extra.expert_ids_of_token is None:  # check_routing_inputs has the full messages
        raise ValueError("route: selection='hash' needs token_ids and weights.router.expert_ids_of_token")
    ids = extra.expert_ids_of_token.index_select(0, token_ids).to(torch.int64)
    if config.router.scoring_order == "after_top_k":
        return ids, scores_of(config, z.gather(-1, ids))
    return ids, scores_of(config, z).gather(-1, ids)


def _sparsemixer(config: MoEConfig, extra: RouterWeights, z: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two softmaxes, each over the logits near its maximum (arXiv 2409.12136), deterministic as at inference."""
    first_id, first = _sparsemixer_choice(config, z, z)
    rest = z.scatter(-1, first_id, -torch.inf)
    second_id, second = _sparsemixer_choice(config, z, rest)
    return torch.cat([first_id, second_id], -1), torch.cat([first, second], -1)


def _sparsemixer_choice(config: MoEConfig, z: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    best = _best(
        torch.nan_to_num(
            candidates.detach(), nan=torch.finfo(z.dtype).min, posinf=torch.finfo(z.dtype).min, neginf=-torch.inf
        ),
        1,
    )
    largest = candidates.detach().gather(-1, best)
    scale = torch.maximum(z.detach().abs(), largest)
    # NaN > threshold is False: 0 / 0 keeps the expert
    far = (largest - z.detach()) / scale > 2 * config.router.sparsemixer_epsilon
    p = ARITHMETIC[config.batch_invariant].softmax(torch.where(far, -torch.inf, candidates))
    return best, finite(p.gather(-1, best))


SELECTIONS: dict[str, Callable[[MoEConfig, RouterWeights, Tensor, Tensor | None], tuple[Tensor, Tensor]]] = {
    "top_k": _top_k,
    "hash": _hash,
    "sparsemixer": _sparsemixer,
}


def scores_of_logits(config: MoEConfig, logits: Tensor) -> Tensor:
    """Returns the scores of all choices [tokens, num_choices], for balancing losses."""
    return scores_of(config, transformed_logits(config, logits).narrow(-1, 0, config.num_choices))
