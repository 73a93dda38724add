"""Reference router: expert ids and weights of each token from its logits."""

import torch
from torch import Tensor

from moe_fn.config import GroupConfig, MoEConfig, RouterConfig
from moe_fn.records import MoEWeights, RouterWeights, Routing
from moe_fn.reference.scores import best, comparable, pick, score
from moe_fn.reference.tensors import float64_weights, is_real, needed, stack_rows, zero_of


def route(
    config: MoEConfig,
    weights: MoEWeights,
    logits: Tensor,
    *,
    token_ids: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Routing:
    """The top_k expert ids of every token and their weights.

        z = softcap(logits * multiplier);  ids = top_k(score(z) + correction_bias);  w = score(z)[ids]
        w = w / norm(w) * expert_scale[ids] * routed_scaling_factor

    logits [..., num_logits] of any float dtype, token_ids [...] ints, token_mask [...] bool (False: padding) ->
    expert_ids [T, top_k] int64 (-1 on padding), weights [T, top_k] float64 (0 on padding), shared_weights [T, shared
    experts].
    Source: Mixtral, DeepSeek-V2/V3/V4, Phi-3.5-MoE, Llama-4, Gemma-4, Inkling.

    >>> config = MoEConfig(num_experts=3, top_k=2, hidden_size=1, intermediate_size=1)
    >>> weights = MoEWeights(gate_up=torch.zeros(3, 2, 1), down=torch.zeros(3, 1, 1))
    >>> routing = route(config, weights, torch.tensor([[0.0, 1.0, 1.0]]))
    >>> routing.expert_ids.tolist(), routing.weights.tolist()
    ([[1, 2]], [[0.5, 0.5]])
    """
    return route_comparing_in(logits.dtype, config, weights, logits, token_ids, token_mask)


def route_comparing_in(
    logits_dtype: torch.dtype,
    config: MoEConfig,
    weights: MoEWeights,
    logits: Tensor,
    token_ids: Tensor | None,
    token_mask: Tensor | None,
) -> Routing:
    """`route` with the comparison of scores in the precision for `logits_dtype`, which may differ from logits.dtype.

    Scores are compared in float32 unless logits_dtype is float64, so that ties in float32 are ties here too.
    """
    compare_in = torch.float64 if logits_dtype == torch.float64 else torch.float32
    router = float64_weights(weights).router or RouterWeights()
    rows = logits.to(torch.float64).reshape(-1, config.num_logits).unbind(0)
    hashed = hashed_ids(config, router, token_ids, len(rows))
    shared_count = config.num_logits - config.num_choices
    all_ids: list[list[int]] = []
    all_weights: list[Tensor] = []
    all_shared: list[Tensor] = []
    for row, ids_of_hash, real in zip(rows, hashed, is_real(token_mask, len(rows)), strict=True):
        if real:
            ids, slot_weights, shared_weights = route_token(config, router, row, ids_of_hash, compare_in)
        else:  # padding is not read: it may have any values
            ids, slot_weights, shared_weights = (
                [-1] * config.top_k,
                row.new_zeros(config.top_k),
                row.new_zeros(shared_count),
            )
        all_ids.append(list(ids))  # a copy: tokens with equal token ids share a row of the table
        all_weights.append(slot_weights)
        all_shared.append(shared_weights)
    if config.router.capacity is not None:
        drop_beyond_capacity(
            config, config.router.capacity, logits.shape[-2] if logits.ndim > 2 else len(rows), all_ids, all_weights
        )
    zero = zero_of(logits, router.expert_scale)
    return Routing(
        expert_ids=torch.tensor(all_ids, dtype=torch.int64, device=logits.device).reshape(-1, config.top_k),
        weights=stack_rows(all_weights, config.top_k, zero) + zero,
        shared_weights=stack_rows(all_shared, shared_count, zero) + zero if shared_count else None,
    )


def drop_beyond_capacity(
    config: MoEConfig, capacity: int, sequence: int, ids: list[list[int]], weights: list[Tensor]
) -> None:
    """Drops slots beyond an expert's capacity in each sequence of tokens: sets ids to -1 and weights to 0 in the lists.

    First choices of all tokens take precedence over second choices. Source: Switch (arXiv 2101.03961), GShard
    (2006.16668).
    """
    for start in range(0, len(ids), max(sequence, 1)):
        taken = [0] * config.num_experts
        for choice in range(config.top_k):
            for token in range(start, min(start + sequence, len(ids))):
                expert = ids[token][choice]
                if not 0 <= expert < config.num_experts:
                    continue
                taken[expert] += 1
                if taken[expert] > capacity:
                    ids[token][choice] = -1
                    kept = torch.ones(config.top_k, dtype=weights[token].dtype, device=weights[token].device)
                    kept[choice] = 0.0
                    weights[token] = weights[token] * kept


def hashed_ids(
    config: MoEConfig, router: RouterWeights, token_ids: Tensor | None, tokens: int
) -> list[list[int] | None]:
    """The expert ids of every token in the hash table of token ids; None unless the selection is "hash"."""
    if config.router.selection != "hash":
        return [None] * tokens
    table = needed(router.expert_ids_of_token, "weights.router.expert_ids_of_token").tolist()
    vocabulary = needed(token_ids, "token_ids").reshape(-1).tolist()
    # A padding token may have any token id; its row is not used.
    return [table[token] if 0 <= token < len(table) else None for token in vocabulary]


def route_token(
    config: MoEConfig, weights: RouterWeights, row: Tensor, ids_of_hash: list[int] | None, compare_in: torch.dtype
) -> tuple[list[int], Tensor, Tensor]:
    """Routing of one token: row [num_logits] -> top_k ids, weights [top_k], shared_weights [shared experts or 0]."""
    router = config.router
    z = row * router.logit_multiplier
    if router.logit_softcap is not None:
        z = router.logit_softcap * torch.tanh(z / router.logit_softcap)
    z, shared_z = z[: config.num_choices], z[config.num_choices :]
    shared = score(router.scoring, shared_z) if len(shared_z) else shared_z
    if router.selection == "sparsemixer":
        ids, chosen = sparsemixer(router, z, compare_in)
    elif router.selection == "hash":
        if ids_of_hash is None:
            raise ValueError("token_ids: expected ids that weights.router.expert_ids_of_token has a row for")
        ids, chosen = ids_of_hash, weights_of_ids(router, z, ids_of_hash)
    else:
        ids, chosen = top_k(config, weights, z, compare_in)
    if router.renormalize:
        divisor = norm_of_weights(router, torch.cat([chosen, shared]))
        chosen, shared = chosen / divisor, shared / divisor
    if weights.expert_scale is not None:
        chosen = chosen * pick(weights.expert_scale, ids, missing=0.0)
        shared = shared * weights.expert_scale[config.num_choices :]
    if router.scale_on == "weights":
        chosen, shared = chosen * router.routed_scaling_factor, shared * router.routed_scaling_factor
    return ids, chosen, shared


def weights_of_ids(router: RouterConfig, z: Tensor, ids: list[int]) -> Tensor:
    """Scores of the ids, normalized over all choices or over the ids. The score of an id out of range (-1) is 0."""
    if router.scoring_order == "before_top_k":
        return pick(score(router.scoring, z), ids, missing=0.0)
    return score(router.scoring, pick(z, ids, missing=-torch.inf))


def top_k(config: MoEConfig, weights: RouterWeights, z: Tensor, compare_in: torch.dtype) -> tuple[list[int], Tensor]:
    """The top_k best choices and their scores; correction_bias changes the choice, not the scores."""
    router = config.router
    by_logits = router.correction_bias == "logits" or (
        router.scoring_order == "after_top_k" and router.correction_bias == "none"
    )
    value = z if by_logits else score(router.scoring, z)
    if router.correction_bias != "none":
        value = value + needed(weights.correction_bias, "weights.router.correction_bias")
    values = comparable(value, compare_in)
    if router.groups is None:
        ids = best(values, config.top_k)
    elif router.groups.limit == "each":
        ids = best_of_each_group(router.groups, values, config.top_k)
    else:
        kept = in_kept_groups(router.groups, values)
        ids = best(torch.where(kept, values, 0.0 if router.groups.fill == "zero" else -torch.inf), config.top_k)
        if router.correction_bias == "none":  # then the weights are the filled values themselves
            return ids, pick(torch.where(kept, score(router.scoring, z), 0.0), ids, missing=0.0)
    return ids, weights_of_ids(router, z, ids)


def best_of_each_group(groups: GroupConfig, values: Tensor, count: int) -> list[int]:
    """The best count / groups of every group of consecutive choices, in the order of groups."""
    size = len(values) // groups.count
    return [
        g * size + i
        for g in range(groups.count)
        for i in best(values[g * size : (g + 1) * size], count // groups.count)
    ]


def in_kept_groups(groups: GroupConfig, values: Tensor) -> Tensor:
    """Whether each choice is in one of the best groups: [choices] bool.

    The score of a group is its best value, or the sum of its two best.
    """
    by_group = values.reshape(groups.count, -1)
    group_scores = by_group.topk(2).values.sum(1) if groups.score == "top2_sum" else by_group.amax(1)
    kept = best(group_scores, groups.top_k)
    size = by_group.shape[1]
    return torch.tensor([choice // size in kept for choice in range(len(values))], device=values.device)


def norm_of_weights(router: RouterConfig, chosen: Tensor) -> Tensor:
    """D = max((sum |w|^order)^(1/order) + epsilon, minimum), or 1 where that is not positive."""
    total = chosen.abs().pow(router.renormalize_order).sum()
    if router.renormalize_order != 1.0 and total > 0:  # the root of 0 is 0, but has no derivative
        total = total ** (1.0 / router.renormalize_order)
    total = (total + router.renormalize_epsilon).clamp(min=router.renormalize_minimum)
    return total if total > 0 else torch.ones_like(total)


def sparsemixer(router: RouterConfig, z: Tensor, compare_in: torch.dtype) -> tuple[list[int], Tensor]:
    """The two best logits, each weighted by a softmax over the logits near it, the second without the first.

    m = z[id];  e is near unless (m - z_e) / max(|z_e|, m) > 2 epsilon.  Source: Phi-3.5-MoE.
    """
    first, second = best(comparable(z, compare_in), 2)
    without_first = torch.where(torch.arange(len(z), device=z.device) == first, -torch.inf, z)
    return [first, second], torch.stack(
        [weight_among_near(router, z, z, first), weight_among_near(router, z, without_first, second)]
    )


def weight_among_near(router: RouterConfig, z: Tensor, candidates: Tensor, chosen: int) -> Tensor:
    """softmax(candidates without those far from z[chosen])[chosen]. NaN compares as false, so it is kept."""
    top = z[chosen].detach()
    far = (top - z.detach()) / torch.maximum(z.detach().abs(), top) > 2.0 * router.sparsemixer_epsilon
    return score("softmax", torch.where(far, -torch.inf, candidates))[chosen]
