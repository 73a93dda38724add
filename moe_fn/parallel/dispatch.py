"""Formats of dispatch between ranks: each sends tokens to the ranks of their experts and combines the results.

Where the experts round their inputs, rows are sent as codes and scales (`moe_fn.quant.wire`); results are sent
unrounded. Each format calls `shared_fn` once, between the start of a collective and its wait, so that the shared
experts overlap with communication.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fn.config import MoEConfig, RankGroup
from moe_fn.fused.route import _route
from moe_fn.fused.routed_experts import routed_experts, weighted_slots
from moe_fn.numerics import accumulation_dtype
from moe_fn.ops import collectives, rounded_collectives
from moe_fn.ops.rows import ends_of_keys, gather_rows, sort_slots
from moe_fn.parallel.expert_ranks import places_of_experts
from moe_fn.parallel.gathering import check_room, padded, room_of_ranks, token_group
from moe_fn.parallel.sizes import sizes_on_host
from moe_fn.quant.wire import packed, travelling, unpacked
from moe_fn.records import Dispatched, MoEWeights, Routing
from moe_fn.stages.combine import _combine
from moe_fn.stages.dispatch import weighted

Overflow = Tensor | None  # the number of slots of this rank dropped by the capacity
SharedFn = Callable[[], Tensor | None]  # computes the shared experts, which need no other rank's tokens
Result = tuple[Tensor, Tensor | None, Overflow]  # routed, result of shared_fn(), overflow


def _own_ids(config: MoEConfig, weights: MoEWeights, ids: Tensor) -> Tensor:
    """Ids as numbers of this rank's experts, -1 for all others."""
    parallel = config.parallel
    mine = parallel.ep.rank if parallel is not None and parallel.ep is not None else 0
    rank, own = places_of_experts(config, weights, ids)
    return torch.where(rank == mine, own, -1)


def _compute(
    config: MoEConfig, weights: MoEWeights, x: Tensor, ids: Tensor, w: Tensor, adapter_ids: Tensor | None
) -> Tensor:
    """The part of y from this rank's experts: x [T, Hx], own ids and weights [T, K], adapters [T] -> [T, Hx]."""
    routing = Routing(expert_ids=ids, weights=w, adapter_ids=adapter_ids)
    if config.router.weight_on == "output":
        return routed_experts(config.own, weights, x, routing)
    return weighted_slots(config, x, routing, functools.partial(routed_experts, config.own, weights))


def one_rank(
    config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing, logits: Tensor | None, shared_fn: SharedFn
) -> Result:
    """Format None: this rank has all experts, without communication."""
    return routed_experts(config, weights, x, routing), shared_fn(), None


def replicated(
    config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing, logits: Tensor | None, shared_fn: SharedFn
) -> Result:
    """Format "replicated": every rank of ep has all tokens, computes its own experts, and results are summed.

    Bytes sent: 2 (n-1)/n T X (letters: `traffic`).
    """
    ep = config.parallel.ep if config.parallel else None
    x, w = collectives.copy_to_ranks(x, ep), collectives.copy_to_ranks(routing.weights, ep)
    y = _compute(config, weights, x, _own_ids(config, weights, routing.expert_ids), w, routing.adapter_ids)
    if ep is None:
        return y, shared_fn(), None
    total = collectives.start_sum(y, ep)
    shared = shared_fn()
    return collectives.wait(total), shared, None


def all_gather(
    config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing, logits: Tensor | None, shared_fn: SharedFn
) -> Result:
    """Format "all_gather": gathers tokens of all ranks, computes own experts on them, and reduce-scatters the results.

    Bytes sent: (n-1) M (X + K w + 8 K) for tokens, or (n-1) M (X + E b + 8) with logits, and (n-1) M X for results
    (letters: `traffic`).
    """
    group = token_group(config)
    tokens = x.shape[0]
    room = room_of_ranks(config, tokens, group, routing.expert_ids)
    real = routing.expert_ids.new_ones(tokens, 1)
    ids = routing.expert_ids + 1 if logits is None else real  # padding has id -1, and no adapter
    ids = ids if routing.adapter_ids is None else torch.cat([ids, routing.adapter_ids.unsqueeze(1) + 1], 1)
    codes, x = travelling(config, x.dtype, weighted=False), padded(x, room)
    sent = (packed(codes, x), padded(routing.weights if logits is None else logits, room), padded(ids, room))
    begun = [collectives.start_gather(t, group) for t in sent]
    shared = shared_fn()
    rows, w, ids = (collectives.wait(t) for t in begun)
    rows = unpacked(codes, rows, x, lambda rows, received: rounded_collectives.as_gathered(rows, received, group))
    ids, adapter_ids = _ids_and_adapters(ids - 1, config.top_k if logits is None else 1)
    if logits is not None:
        gathered = _route(config, weights, w, None, None)
        ids, w = torch.where(ids < 0, -1, gathered.expert_ids), gathered.weights
    y = _compute(config, weights, rows, _own_ids(config, weights, ids), w, adapter_ids)
    return collectives.scatter_ranks(y, group).narrow(0, 0, tokens), shared, None


def all_to_all(
    config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing, logits: Tensor | None, shared_fn: SharedFn
) -> Result:
    """Format "all_to_all": sends each slot to its expert's rank and the result back, with one host sync for sizes.

    Bytes sent, for S slots of other ranks' experts: 8 (n-1) for counts, S (X + 8) for slots, S X for results (letters:
    `traffic`).
    """
    group = _ep(config)
    sorted_ = _by_rank(config, weights, x, routing, group)
    counts = _counts(sorted_.rank_of_row, group.size)
    both = torch.stack([counts, collectives.exchange_ranks(counts, group)])
    sizes = sizes_on_host(both)
    total = sum(sizes[0])
    torch._check(total <= sorted_.rows.shape[0])
    codes, out = travelling(config, x.dtype, weighted=True), sorted_.rows.narrow(0, 0, total)
    sent = (packed(codes, out), sorted_.ids_of_row.narrow(0, 0, total))
    begun = [collectives.start_splits(t, sizes[0], sizes[1], group) for t in sent]
    shared = shared_fn()
    rows, ids = (collectives.wait(t) for t in begun)
    rows = unpacked(
        codes, rows, out, lambda rows, received: rounded_collectives.as_split(rows, received, sizes[0], sizes[1], group)
    )
    y = _of_slots(config, weights, rows, ids)
    back = collectives.exchange_splits(y, sizes[1], sizes[0], group)
    rows = torch.cat([back, back.new_zeros(sorted_.rows.shape[0] - total, back.shape[1])])
    return _combined(config, rows, sorted_, routing), shared, None


def all_to_all_static(
    config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing, logits: Tensor | None, shared_fn: SharedFn
) -> Result:
    """Format "all_to_all_static": all_to_all with padded blocks of C slots for each pair of ranks, without host syncs.

    Bytes sent: (n-1) C (X + 8) for slots, (n-1) C X for results (letters: `traffic`). Slots beyond C of a pair are
    dropped, and counted in the last result. Blocks for each expert would have num_experts * max_tokens rows instead of
    n * max_tokens * top_k; rows of padding have no expert, so kernels skip them.
    """
    group, capacity = _ep(config), _capacity(config)
    check_room(x.shape[0], config.parallel.max_tokens if config.parallel and config.parallel.max_tokens else x.shape[0])
    sorted_ = _by_rank(config, weights, x, routing, group)
    slots = sorted_.rank_of_row.shape[0]
    counts = _counts(sorted_.rank_of_row, group.size)
    starts = counts.cumsum(0) - counts
    place = torch.arange(capacity, device=x.device)
    row_of_place = (starts.unsqueeze(1) + place).flatten()
    taken = (place < counts.unsqueeze(1)).flatten()
    row_of_place = torch.where(taken, row_of_place, slots)  # index of the row of zeros after all others
    rows = _with_spare(sorted_.rows).index_select(0, row_of_place)
    ids = torch.where(taken.unsqueeze(1), _with_spare(sorted_.ids_of_row).index_select(0, row_of_place), -1)
    codes = travelling(config, x.dtype, weighted=True)
    begun = [collectives.start_exchange(t, group) for t in (packed(codes, rows), ids)]
    shared = shared_fn()
    data, ids = (collectives.wait(t) for t in begun)
    came = unpacked(codes, data, rows, lambda rows, received: rounded_collectives.as_exchanged(rows, received, group))
    y = collectives.exchange_ranks(_of_slots(config, weights, came, ids), group)
    place_of_row, dropped = _places_in_blocks(sorted_.rank_of_row, starts, capacity)
    back = _with_spare(y).index_select(0, place_of_row)
    return _combined(config, back, sorted_, routing), shared, dropped


@dataclass(frozen=True)
class SortedByRank:
    """Slots sorted by the rank of their expert; slots without an expert are last, with ep's size as their rank."""

    rows: Tensor  # [R, Hx]
    ids_of_row: Tensor  # [R, 1 or 2]: number of the expert on its rank; adapter
    rank_of_row: Tensor  # [R]
    slot_of_row: Tensor  # [R]
    row_of_slot: Tensor  # [R]


def _by_rank(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing, group: RankGroup) -> SortedByRank:
    ranks, own = (t.flatten() for t in places_of_experts(config, weights, routing.expert_ids))
    rank_of_row, slot_of_row, row_of_slot = sort_slots(ranks)
    rows = gather_rows(x, slot_of_row, row_of_slot, config.top_k)
    if config.router.weight_on == "input":
        rows = weighted(config, rows, gather_rows(routing.weights.reshape(-1, 1), slot_of_row, row_of_slot, 1))
    ids = [own.unsqueeze(1)]
    if routing.adapter_ids is not None:
        ids.append(routing.adapter_ids.unsqueeze(1).expand(routing.expert_ids.shape).reshape(-1, 1))
    ids_of_row = torch.cat(ids, 1).index_select(0, slot_of_row)
    return SortedByRank(
        rows=rows, ids_of_row=ids_of_row, rank_of_row=rank_of_row, slot_of_row=slot_of_row, row_of_slot=row_of_slot
    )


def _of_slots(config: MoEConfig, weights: MoEWeights, rows: Tensor, ids_of_row: Tensor) -> Tensor:
    """The experts' outputs for received rows, unweighted: routing weights stay on the token's rank."""
    own_ids, adapter_ids = _ids_and_adapters(ids_of_row, 1)
    ones = torch.ones(rows.shape[0], 1, dtype=accumulation_dtype(rows.dtype), device=rows.device)
    return routed_experts(config.own, weights, rows, Routing(expert_ids=own_ids, weights=ones, adapter_ids=adapter_ids))


def _ids_and_adapters(ids: Tensor, columns: int) -> tuple[Tensor, Tensor | None]:
    """The first `columns` columns of ids, and the next one, the adapter ids, if there is one."""
    return ids.narrow(1, 0, columns), ids.select(1, columns) if ids.shape[1] > columns else None


def _combined(config: MoEConfig, rows: Tensor, sorted_: SortedByRank, routing: Routing) -> Tensor:
    """The weighted sum over a token's slots, on its own rank."""
    d = Dispatched(
        rows=rows, expert_ends=sorted_.rank_of_row, slot_of_row=sorted_.slot_of_row, row_of_slot=sorted_.row_of_slot
    )
    return _combine(config, rows, d, routing)


def _counts(sorted_ranks: Tensor, ranks: int) -> Tensor:
    """The number of rows for each rank."""
    ends = ends_of_keys(sorted_ranks, ranks)
    return torch.diff(ends, prepend=ends.new_zeros(1))


def _places_in_blocks(rank_of_row: Tensor, starts: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Index of each row's result in blocks of `capacity` rows per rank, and the number of dropped rows.

    The index of rows that are not sent is that of the row after all blocks.
    """
    ranks = starts.shape[0]
    own_place = torch.arange(rank_of_row.shape[0], device=rank_of_row.device) - _with_spare(starts).index_select(
        0, rank_of_row
    )
    has_rank = rank_of_row < ranks
    fits = has_rank & (own_place < capacity)
    return torch.where(fits, rank_of_row * capacity + own_place, ranks * capacity), (has_rank & ~fits).sum()


def _with_spare(rows: Tensor) -> Tensor:
    """The rows and one more row of zeros, for indices of missing rows."""
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])


def _capacity(config: MoEConfig) -> int:
    parallel = config.parallel
    most = (parallel.max_tokens or 0) * config.top_k if parallel else 0
    return most if parallel is None or parallel.capacity is None else min(parallel.capacity, most)


def can_drop_slots(config: MoEConfig) -> bool:
    """Whether the capacity can drop slots."""
    parallel = config.parallel
    return (
        parallel is not None
        and parallel.capacity is not None
        and parallel.capacity < (parallel.max_tokens or 0) * config.top_k
    )


def _ep(config: MoEConfig) -> RankGroup:
    if config.parallel is None or config.parallel.ep is None:
        raise ValueError("MoEConfig.parallel.ep is None; expected the group of ranks that have the experts")
    return config.parallel.ep


Format = Callable[[MoEConfig, MoEWeights, Tensor, Routing, Tensor | None, SharedFn], Result]
FORMATS: dict[str | None, Format] = {
    None: one_rank,
    "replicated": replicated,
    "all_gather": all_gather,
    "all_to_all": all_to_all,
    "all_to_all_static": all_to_all_static,
}
