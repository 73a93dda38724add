"""route: logits -> Routing. The tables of score and selection functions are here; a new one is a line."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fn.backends import backend_of
from moe_fn.checking import check_routing_inputs
from moe_fn.config import GroupConfig, MoEConfig, RouterConfig
from moe_fn.numerics import accumulation_dtype
from moe_fn.ops.grouped import GROUPED
from moe_fn.records import MoEWeights, RouterWeights, Routing


def _sqrt_softplus(z: Tensor) -> Tensor:
    softplus = F.softplus(z)
    positive = softplus > 0  # below -104 it is 0 in float32, where the derivative of the root is infinite, and inf * 0 is NaN
    return torch.where(positive, torch.where(positive, softplus, 1).sqrt(), 0)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: torch.softmax(z, -1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": _sqrt_softplus,
    "identity": lambda z: z,
}


def route(
    config: MoEConfig, weights: MoEWeights, logits: Tensor, *, token_ids: Tensor | None = None, token_mask: Tensor | None = None
) -> Routing:
    """Choose experts for every token, and how much each counts.

        z = f32(logits) * logit_multiplier, soft-capped;   s = score(z), NaN and infinite scores are 0
        ids = the top_k largest of s + correction_bias (in the best groups), ties to the lowest id
        w = s[ids];   w /= max(sum w + epsilon, minimum) or 1 where that is 0;   w *= expert_scale[ids] * routed_scaling_factor

    logits [tokens, config.num_logits], any float dtype; token_ids [tokens] integers, for hash routing; token_mask [tokens] bool,
    False for padding, which gets ids -1 and weights 0. Returns ids int64 [tokens, top_k], weights float32 (float64 for float64).
    Other forms (scores after the choice, sparsemixer, hash, per-group choice): `RouterConfig`, `GroupConfig`.

    Raises ValueError for shapes and dtypes that do not fit the config, and for router weights that it would ignore.

    Laws
        Routing equals the reference.
        Ids of a token are distinct and in range.
        Weights are finite and float32.
        Ties go to the lowest expert id.
        Renormalised rows sum to the scale.
        Adding a constant to a softmax row changes nothing.
        Permuting experts permutes ids.
        Groups never chosen contribute nothing.
        The correction bias changes the choice but not the weights.
        Padding tokens have no expert.
        Hash routing ignores how large the logits are.

    Source: Shazeer et al. 2017 (arXiv 1701.06538); groups and bias DeepSeek-V2/V3 (2405.04434, 2412.19437); the models in `RouterConfig`.

    >>> config = MoEConfig(num_experts=4, top_k=2, hidden_size=1, intermediate_size=1)
    >>> weights = MoEWeights(gate_up=torch.zeros(4, 2, 1), down=torch.zeros(4, 1, 1))
    >>> route(config, weights, torch.tensor([[0.0, 1.0, 1.0, -1.0]])).expert_ids
    tensor([[1, 2]])
    """
    router, extra = config.router, weights.router or RouterWeights()
    check_routing_inputs(config, extra, logits, token_ids, token_mask)
    if token_mask is not None:
        logits = torch.where(token_mask.unsqueeze(-1), logits, 0)
    z = _transformed_logits(router, logits)
    shared = z.narrow(-1, config.num_choices, z.shape[-1] - config.num_choices) if z.shape[-1] > config.num_choices else None
    z = z.narrow(-1, 0, config.num_choices) if shared is not None else z
    shared = None if shared is None else _finite(SCORES[router.scoring](shared))
    ids, chosen = SELECTIONS[router.selection](config, extra, z, token_ids)
    if router.renormalize:
        total = _norm(router, chosen if shared is None else torch.cat([chosen, shared], -1))
        chosen, shared = chosen / total, None if shared is None else shared / total
    if extra.expert_scale is not None:
        # A gather of an expanded row, whose gradient is a sum in fixed order; indexing it would scatter with atomics.
        chosen = chosen * extra.expert_scale.to(chosen.dtype).expand(z.shape).gather(-1, ids)
    if router.scale_on == "weights" and router.routed_scaling_factor != 1.0:
        chosen = chosen * router.routed_scaling_factor
        shared = None if shared is None else shared * router.routed_scaling_factor
    dtype = accumulation_dtype(logits.dtype)
    routing = Routing(expert_ids=ids, weights=chosen.to(dtype), shared_weights=None if shared is None else shared.to(dtype))
    return routing if token_mask is None else without_padding(routing, token_mask)


def router_logits(config: MoEConfig, weights: MoEWeights, x: Tensor) -> Tensor:
    """The gate inside the layer: x @ gate.T + bias, in float32 or in the dtype of x: [tokens, width] -> [tokens, num_logits]."""
    router = weights.router
    if router is None or router.gate is None:
        raise ValueError("moe_forward: logits is None and weights.router.gate too; expected one of them")
    dtype = accumulation_dtype(x.dtype) if config.router.gate_dtype == "float32" else x.dtype
    x, gate = x.to(dtype), router.gate.to(dtype)
    if backend_of(config, x) == "native":  # a product with one expert: at 1 token torch's own, on one core, costs 100 us more
        ends = torch.full((1,), x.shape[0], dtype=torch.int32)
        logits = GROUPED["native"].matmul(x, gate.unsqueeze(0), ends, True)
    else:
        logits = x @ gate.t()
    return logits if router.bias is None else logits + router.bias.to(dtype)


def without_padding(routing: Routing, token_mask: Tensor) -> Routing:
    """The routing with padding tokens sent nowhere."""
    keep = token_mask.unsqueeze(-1)
    shared = routing.shared_weights
    return Routing(
        expert_ids=torch.where(keep, routing.expert_ids, -1),
        weights=torch.where(keep, routing.weights, 0),
        shared_weights=None if shared is None else torch.where(keep, shared, 0),
    )


def scores_of_logits(config: MoEConfig, logits: Tensor) -> Tensor:
    """Scores of all choices, whichever are chosen; what balancing losses look at."""
    z = _transformed_logits(config.router, logits).narrow(-1, 0, config.num_choices)
    return _finite(SCORES[config.router.scoring](z))


def _transformed_logits(router: RouterConfig, logits: Tensor) -> Tensor:
    z = logits.to(accumulation_dtype(logits.dtype)) if router.score_dtype == "float32" else logits
    if router.logit_multiplier != 1.0:
        z = z * router.logit_multiplier
    if router.logit_softcap is not None:
        z = router.logit_softcap * torch.tanh(z / router.logit_softcap)
    return z


def _finite(scores: Tensor) -> Tensor:
    return torch.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0)


def _norm(router: RouterConfig, weights: Tensor) -> Tensor:
    order = router.renormalize_order
    total = weights.abs().sum(-1, keepdim=True) if order == 1.0 else torch.linalg.vector_norm(weights, order, -1, keepdim=True)
    if router.renormalize_epsilon:
        total = total + router.renormalize_epsilon
    if router.renormalize_minimum:
        total = total.clamp(min=router.renormalize_minimum)
    return torch.where(total > 0, total, 1)


def _best(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, descending, ties to the lowest, for which topk promises nothing: so no two keys are alike.

    A key is the number's bits, made to order as integers do, above the index counted from the end. A stable sort (float64, whose bits
    leave no room) takes five times as long: 2.5 ms for 1024 tokens of 128 experts.
    """
    if values.dtype == torch.float64:
        return values.sort(dim=-1, descending=True, stable=True).indices.narrow(-1, 0, count)
    bits = (values.to(torch.float32) + 0.0).view(torch.int32)  # + 0: -0 is as large as 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    from_the_end = torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)
    best: Tensor = ((ordered << 32) + from_the_end).topk(count, -1).indices
    return best


def _candidates(values: Tensor) -> Tensor:
    """Selection values without gradient; what is not finite is worse than any number, yet better than a masked -inf."""
    lowest = torch.finfo(values.dtype).min
    return torch.nan_to_num(values.detach(), nan=lowest, posinf=lowest, neginf=lowest)


def _with_bias(router: RouterConfig, extra: RouterWeights, kind: str, values: Tensor) -> Tensor:
    if router.correction_bias != kind or extra.correction_bias is None:
        return values
    return values.to(accumulation_dtype(values.dtype)) + extra.correction_bias


def _top_k(config: MoEConfig, extra: RouterWeights, z: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    router = config.router
    after = router.scoring_order == "after_top_k"
    scores = _finite(SCORES[router.scoring](z)) if not after or router.correction_bias == "scores" else z
    if router.correction_bias == "logits" or (after and router.correction_bias == "none"):
        values = _with_bias(router, extra, "logits", z)
    else:
        values = _with_bias(router, extra, "scores", scores)
    values = _candidates(values)
    if router.groups is not None and router.groups.limit == "each":
        ids = _best_of_each_group(router.groups, config.top_k, values)
    else:
        kept = None if router.groups is None else _kept_experts(router.groups, values)
        if kept is not None:
            fill = -torch.inf if router.groups.fill == "-inf" else 0.0  # type: ignore[union-attr]
            values = torch.where(kept, values, fill)
            if router.correction_bias == "none":
                scores = torch.where(kept, scores, 0)
        ids = _best(values, config.top_k)
    if after:
        return ids, _finite(SCORES[router.scoring](z.gather(-1, ids)))
    return ids, scores.gather(-1, ids)


def _kept_experts(groups: GroupConfig, values: Tensor) -> Tensor:
    """Which experts lie in the best groups: bool, like values."""
    by_group = values.unflatten(-1, (groups.count, -1))
    worth = by_group.amax(-1) if groups.score == "max" else by_group.sort(-1, descending=True).values.narrow(-1, 0, 2).sum(-1)
    best = _best(worth, groups.top_k)
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, best, torch.ones_like(best, dtype=torch.bool))
    return kept.unsqueeze(-1).expand(by_group.shape).flatten(-2)


def _best_of_each_group(groups: GroupConfig, top_k: int, values: Tensor) -> Tensor:
    by_group = values.unflatten(-1, (groups.count, -1))
    ids = _best(by_group, top_k // groups.count)
    first = torch.arange(groups.count, device=values.device).unsqueeze(-1) * by_group.shape[-1]
    every: Tensor = ids + first
    return every.flatten(-2)


def _hash(config: MoEConfig, extra: RouterWeights, z: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    if token_ids is None or extra.expert_ids_of_token is None:  # said at length by check_routing_inputs
        raise ValueError("route: selection='hash' needs token_ids and weights.router.expert_ids_of_token")
    score = SCORES[config.router.scoring]
    ids = extra.expert_ids_of_token.index_select(0, token_ids).to(torch.int64)
    if config.router.scoring_order == "after_top_k":
        return ids, _finite(score(z.gather(-1, ids)))
    return ids, _finite(score(z)).gather(-1, ids)


def _sparsemixer(config: MoEConfig, extra: RouterWeights, z: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two softmaxes, each over the logits near its maximum (arXiv 2409.12136); the deterministic form, as at inference."""
    first_id, first = _sparsemixer_choice(config.router, z, z)
    rest = z.scatter(-1, first_id, -torch.inf)
    second_id, second = _sparsemixer_choice(config.router, z, rest)
    return torch.cat([first_id, second_id], -1), torch.cat([first, second], -1)


def _sparsemixer_choice(router: RouterConfig, z: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    best = _best(torch.nan_to_num(candidates.detach(), nan=torch.finfo(z.dtype).min, posinf=torch.finfo(z.dtype).min, neginf=-torch.inf), 1)
    largest = candidates.detach().gather(-1, best)
    scale = torch.maximum(z.detach().abs(), largest)
    far = (largest - z.detach()) / scale > 2 * router.sparsemixer_epsilon  # 0 / 0 is not far: such an expert stays
    p = torch.softmax(torch.where(far, -torch.inf, candidates), -1)
    return best, _finite(p.gather(-1, best))


SELECTIONS: dict[str, Callable[[MoEConfig, RouterWeights, Tensor, Tensor | None], tuple[Tensor, Tensor]]] = {
    "top_k": _top_k,
    "hash": _hash,
    "sparsemixer": _sparsemixer,
}
