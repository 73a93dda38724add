"""Load of experts, balancing losses, and the update of the correction bias: pure functions.

For inputs of any dtype, tokens and slots are counted in int64, scores are summed in float32 (float64 for float64), and
losses and biases are float32 (float64): the largest float16 is 65,504, and bfloat16 rounds 257 to 256.

Laws
    Losses equal the reference.
    Losses in narrow dtypes equal those in float64.
    A bias in any dtype moves by exact loads.
    The bias of overloaded experts falls and of idle ones rises.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from moe_fn.balance.placement import checked_load
from moe_fn.checks import (
    check_dtype,
    check_float,
    check_int,
    check_kind,
    check_per_token,
    checked_ids,
    checked_integers,
)
from moe_fn.config import MoEConfig, RankGroup
from moe_fn.numerics import accumulation_dtype
from moe_fn.ops.collectives import reduced_over_ranks
from moe_fn.records import Routing, RoutingStats
from moe_fn.stages._scores import scores_of_logits
from moe_fn.torch_compat import default_group


def expert_load(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Slots per expert: load[e] is the number of times that e occurs in expert_ids; other ids (-1) are not counted.

    expert_ids [...] integers -> [num_experts] int64.

    >>> expert_load(torch.tensor([[0, 2], [2, -1]]), 3).tolist()
    [1, 0, 2]
    """
    check_int("expert_load: num_experts", num_experts, 1)
    return _load_of_rows(checked_integers("expert_load", "expert_ids", expert_ids).flatten(), num_experts)


def router_z_loss(logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, which keeps logits small (ST-MoE, arXiv 2202.08906).

    logits [..., E] of any float dtype -> [] float32 (float64 for float64).

    >>> router_z_loss(torch.zeros(3, 1)).item()
    0.0
    """
    check_dtype("router_z_loss", "logits", logits, "float")
    _check_mask("router_z_loss", logits, token_mask)
    z = logits.to(accumulation_dtype(logits.dtype))
    z = z if token_mask is None else torch.where(token_mask.unsqueeze(-1), z, 0)
    largest = z.detach().amax(-1, keepdim=True)
    # torch.logsumexp branches on whether there are 0 tokens, which fails for an unbacked size.
    log_sum_exp = (z - largest).exp().sum(-1).log() + largest.squeeze(-1)
    return _mean_over_tokens(log_sum_exp.square(), token_mask)


def load_balancing_loss(scores: Tensor, expert_ids: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """E * sum over experts of (slots of e / tokens) * (mean score of e): Switch (arXiv 2101.03961) and Mixtral in
    transformers.

    scores [tokens, E] of any float dtype (softmax probabilities, usually), expert_ids [tokens, top_k] integers -> []
    float32 (float64 for float64); top_k when perfectly even.

    >>> load_balancing_loss(torch.full((2, 2), 0.5), torch.tensor([[0], [1]])).item()
    1.0
    """
    expert_ids = _check_scores("load_balancing_loss", scores, expert_ids, token_mask, 2)
    experts, wide = scores.shape[-1], accumulation_dtype(scores.dtype)
    ids = expert_ids if token_mask is None else torch.where(token_mask.unsqueeze(-1), expert_ids, -1)
    load = expert_load(ids, experts).to(wide)
    kept = scores if token_mask is None else torch.where(token_mask.unsqueeze(-1), scores, 0)
    tokens = _count_tokens(scores.select(-1, 0), token_mask)
    return experts * (load / tokens * (kept.sum(0, dtype=wide) / tokens)).sum()


def sequence_balancing_loss(scores: Tensor, expert_ids: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Mean over sequences of sum over experts of f_e * P_e, with f_e = E / (top_k S) * slots of e and P_e the mean
    normalized score of e.

    scores [B, S, E] of any float dtype, expert_ids [B, S, top_k] integers, token_mask [B, S] -> [] float32 (float64 for
    float64); 1 when perfectly even. DeepSeek-V3 (arXiv 2412.19437, eq. 17-20).

    >>> sequence_balancing_loss(torch.full((1, 2, 2), 0.5), torch.tensor([[[0], [1]]])).item()
    1.0
    """
    expert_ids = _check_scores("sequence_balancing_loss", scores, expert_ids, token_mask, 3)
    experts, top_k = scores.shape[-1], expert_ids.shape[-1]
    scores = scores.to(accumulation_dtype(scores.dtype))
    total = scores.sum(-1, keepdim=True)
    share = scores / torch.where(total != 0, total, 1)
    ids = expert_ids if token_mask is None else torch.where(token_mask.unsqueeze(-1), expert_ids, -1)
    share = share if token_mask is None else torch.where(token_mask.unsqueeze(-1), share, 0)
    length = _count_tokens(share.select(-1, 0), token_mask).unsqueeze(-1)
    f = experts / top_k * _load_of_rows(ids.flatten(-2), experts).to(share.dtype) / length
    return (f * share.sum(1) / length).sum() / max(scores.shape[0], 1)


def load_over_ranks(load: Tensor, group: "dist.ProcessGroup | RankGroup | None" = None) -> Tensor:
    """The sum of the load over the ranks of a group: the input of update_correction_bias and place_experts.

    load [...] integers or floats of one rank, such as stats.expert_load or a window's total -> [...] int64, float32 or
    float64, the same on every rank. group: of torch.distributed, or of the config (config.parallel.ep); None: all
    ranks, or the load itself without torch.distributed. Every rank of the group must call it. Ranks with the same
    tokens (of tp, of sp, of ep with "replicated") each count them, which multiplies all loads by the same factor. Does
    not read values on the host; a RankGroup works inside a graph too.

    >>> load_over_ranks(torch.tensor([3, 1], dtype=torch.int32))
    tensor([3, 1])
    """
    load = checked_load("load_over_ranks", "load", load)
    if not (group is None or isinstance(group, RankGroup) or hasattr(group, "group_name")):
        raise ValueError(
            f"load_over_ranks: group is a {type(group).__name__}; expected a ProcessGroup of this rank, or a RankGroup"
        )
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return load
    own = default_group() if group is None else group
    return reduced_over_ranks(load, "sum", own.name if isinstance(own, RankGroup) else own.group_name)


def update_correction_bias(correction_bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """One step of loss-free balancing: bias + rate * sign(mean load - load).

    correction_bias [..., E] of any float dtype, load [..., E] integers or floats -> [..., E] float32 (float64 for
    float64), a new tensor; leading dimensions may be layers. Keep it in float32: in bfloat16 a bias of 1 plus a rate of
    1e-3 is 1. Integer loads are compared exactly, while E times the load fits in int64. With several ranks, pass
    `load_over_ranks(load)`, so that every rank has the same bias. Wang et al. 2024 (arXiv 2408.15664); rate about 1e-3.

    >>> update_correction_bias(torch.zeros(3), torch.tensor([4, 2, 0]), 0.5).tolist()
    [-0.5, 0.0, 0.5]
    """
    check_dtype("update_correction_bias", "correction_bias", correction_bias, "float")
    check_kind("update_correction_bias", "load", load, Tensor)
    check_float("update_correction_bias: rate", rate)
    if load.shape != correction_bias.shape or load.ndim == 0:
        wanted = (
            "[..., E]"
            if load.ndim == correction_bias.ndim == 0
            else f"that of correction_bias, {list(correction_bias.shape)}"
        )
        raise ValueError(f"update_correction_bias: load is {list(load.shape)}; expected {wanted}")
    if load.device != correction_bias.device:
        raise ValueError(
            f"update_correction_bias: load is on {load.device}; expected that of correction_bias, "
            f"{correction_bias.device}"
        )
    load = checked_load("update_correction_bias", "load", load)
    load = load.to(torch.float64) if load.is_floating_point() else load
    # sign of mean - load, without a division that rounds
    above = torch.sign(load.sum(-1, keepdim=True) - load.shape[-1] * load)
    wide = accumulation_dtype(correction_bias.dtype)
    return correction_bias.to(wide) + rate * above.to(wide)


def stats_of_routing(
    config: MoEConfig, logits: Tensor, routing: Routing, token_mask: Tensor | None, leading: tuple[int, ...]
) -> RoutingStats:
    """The RoutingStats of one call: load, dropped slots and losses.

    leading: dimensions of the tokens before flattening; the last is the sequence.
    """
    ids = routing.expert_ids
    logits = logits if token_mask is None else torch.where(token_mask.unsqueeze(-1), logits, 0)
    scores = scores_of_logits(config, logits)
    sequences = (math.prod(leading[:-1]), leading[-1])
    real = ids.new_ones(ids.shape, dtype=torch.bool) if token_mask is None else token_mask.unsqueeze(-1)
    return RoutingStats(
        expert_ids=ids,
        expert_load=expert_load(ids, config.num_choices),
        dropped_slots=((ids < 0) & real).sum(),
        router_z_loss=router_z_loss(logits.narrow(-1, 0, config.num_choices), token_mask),
        load_balancing_loss=load_balancing_loss(scores, ids, token_mask),
        sequence_balancing_loss=sequence_balancing_loss(
            scores.view(*sequences, scores.shape[-1]),
            ids.view(*sequences, ids.shape[-1]),
            None if token_mask is None else token_mask.view(sequences),
        ),
    )


def _check_scores(where: str, scores: Tensor, expert_ids: Tensor, token_mask: Tensor | None, dims: int) -> Tensor:
    """Checks scores, expert ids and mask against each other; returns the ids as int64."""
    check_dtype(where, "scores", scores, "float")
    if scores.ndim != dims:
        raise ValueError(
            f"{where}: scores is {list(scores.shape)}; expected {'[tokens, E]' if dims == 2 else '[B, S, E]'}"
        )
    check_kind(where, "expert_ids", expert_ids, Tensor)
    expert_ids = checked_ids(
        where, "expert_ids", expert_ids, scores, ("top_k", expert_ids.shape[-1] if expert_ids.ndim else 1)
    )
    _check_mask(where, scores, token_mask)
    return expert_ids


def _check_mask(where: str, scores: Tensor, token_mask: Tensor | None) -> None:
    if token_mask is not None:
        check_per_token(where, "token_mask", token_mask, scores, None, "bool")


def _load_of_rows(expert_ids: Tensor, num_experts: int) -> Tensor:
    """expert_load of each row: [..., slots] -> [..., num_experts].

    Slots without an expert are counted in one more bin, which is cut off.
    """
    bins = torch.where((expert_ids >= 0) & (expert_ids < num_experts), expert_ids, num_experts)
    counts = torch.zeros(*bins.shape[:-1], num_experts + 1, dtype=torch.int64, device=bins.device)
    return counts.scatter_add(-1, bins, torch.ones_like(bins)).narrow(-1, 0, num_experts)


def _count_tokens(per_token: Tensor, token_mask: Tensor | None) -> Tensor:
    """The number of unmasked tokens in the last dimension, at least 1, as int64: the loss of 0 tokens is 0."""
    counted = torch.ones_like(per_token, dtype=torch.bool) if token_mask is None else token_mask
    return counted.sum(-1).clamp(min=1)


def _mean_over_tokens(values: Tensor, token_mask: Tensor | None) -> Tensor:
    values, token_mask = values.flatten(), None if token_mask is None else token_mask.flatten()
    kept = values if token_mask is None else torch.where(token_mask, values, 0)
    return kept.sum() / _count_tokens(values, token_mask)
