"""The layer behind the router, on the ranks that share it."""

import dataclasses
import functools

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from moe_fn.config import MoEConfig, ParallelConfig
from moe_fn.ops import collectives
from moe_fn.parallel.adapters import adapters_of_each
from moe_fn.parallel.dispatch import FORMATS, Overflow, may_overflow
from moe_fn.records import MoEWeights, Routing
from moe_fn.stages.join import addends, join
from moe_fn.stages.reduce_and_trunc import reduce_and_trunc
from moe_fn.stages.shared import shared_experts
from moe_fn.stages.transform import norm_output, transform_input, transform_output
from moe_fn.stages.zero_experts import zero_experts

WEIGHTS_OF_EACH = ("shared", "latent", "constants", "input_norm", "output_norm")  # every rank of sp has them, and uses them for its rows


def layer_over_ranks(
    config: MoEConfig, parallel: ParallelConfig, weights: MoEWeights, x: Tensor, routing: Routing, logits: Tensor | None
) -> tuple[Tensor, Overflow]:
    """(y, slots that found no room) for this rank's tokens: what layer_of_tokens computes with all weights in one place.

    With logits they travel in all_gather, and everybody routes by them; without, the routing does.

    Who sums what, and when:

        dispatch              over ep                       over tp
        replicated            right after the experts       late: once, of routed + shared
        all_gather            scattered, with the tokens    late
        all_gather without ep, over dp: scattered           late
        all_to_all (static)   at the token's own rank       late
        any, with a latent space or replicated shared       early: the routed part alone, before its output transform (which need not be
        experts                                             linear, and whose bias counts once); sharded shared experts by themselves
        any, with sp          as above                      rows are joined at the end, nothing is summed

    Zero experts and the norm of the output come after every sum, once. Gradients of weights that all ranks of tp (of sp) have are
    complete on each of them; of those that ranks with other tokens have (ep, dp) each has its tokens' part, as in data parallelism.

    Laws
        Sharded equals unsharded.
    """
    weights = dataclasses.replace(weights, lora=adapters_of_each(config, weights.lora))
    if parallel.sp is None:
        return _layer(config, parallel, weights, x, routing, logits)
    tokens = x.shape[0]
    size = parallel.sp.size
    rows = -(-tokens // size) * size
    x, routing, logits = (tree_map(functools.partial(_own, parallel, rows), part) for part in (x, _no_expert_as_zero(routing), logits))
    routing = _no_expert_as_zero(routing, -1)
    y, overflow = _layer(config, parallel, _used_by_each(parallel, weights), x, routing, logits)
    if overflow is not None and may_overflow(config):  # of this rank's rows; the tokens are everybody's
        overflow = collectives.reduced_over_ranks(overflow, "sum", parallel.sp.name)
    return collectives.join_rows(y, parallel.sp).narrow(0, 0, tokens), overflow


def _layer(
    config: MoEConfig, parallel: ParallelConfig, weights: MoEWeights, x: Tensor, routing: Routing, logits: Tensor | None
) -> tuple[Tensor, Overflow]:
    tp = parallel.tp
    v = collectives.copy_to_ranks(transform_input(config, weights, x), tp)
    w = collectives.copy_to_ranks(routing.weights, tp)
    logits = None if logits is None else collectives.copy_to_ranks(logits, tp)
    sharded = tp is not None and parallel.shared == "sharded"
    beside = functools.partial(_shared, config, parallel) if sharded else functools.partial(shared_experts, config)
    meanwhile = functools.partial(beside, weights, x, routing)
    routed, shared, overflow = FORMATS[parallel.dispatch](config, weights, v, dataclasses.replace(routing, weights=w), logits, meanwhile)
    routed = reduce_and_trunc(routed, width=config.routed_size)
    late = config.latent is None and (shared is None or sharded)
    if not late:
        routed = reduce_and_trunc(routed, group=tp)
        shared = reduce_and_trunc(shared, group=tp) if shared is not None and sharded else shared
    routed, shared = addends(config, routed, shared, functools.partial(transform_output, config, weights))
    y = join(routed, shared)
    y = reduce_and_trunc(y, group=tp if late else None)
    return norm_output(config, weights, zero_experts(config, weights, x, routing, y)), overflow


def _shared(config: MoEConfig, parallel: ParallelConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> Tensor | None:
    """This rank's slice of the shared experts, a part of a sum over tp."""
    if config.shared is None or weights.shared is None or parallel.tp is None:
        return None
    narrow = dataclasses.replace(weights.shared, gate=_copied(weights.shared.gate, parallel))
    shared_weights = _copied(routing.shared_weights, parallel)
    routing = dataclasses.replace(routing, shared_weights=shared_weights)
    return shared_experts(config, dataclasses.replace(weights, shared=narrow), collectives.copy_to_ranks(x, parallel.tp), routing)


def _copied(t: Tensor | None, parallel: ParallelConfig) -> Tensor | None:
    return None if t is None else collectives.copy_to_ranks(t, parallel.tp)


def _used_by_each(parallel: ParallelConfig, weights: MoEWeights) -> MoEWeights:
    """Weights that every rank of sp has and uses for its own rows: their gradients are sums over sp."""

    def copied(t: Tensor | None) -> Tensor | None:
        return None if t is None else collectives.copy_to_ranks(t, parallel.sp)

    return dataclasses.replace(weights, **{name: tree_map(copied, getattr(weights, name)) for name in WEIGHTS_OF_EACH})


def _no_expert_as_zero(routing: Routing, more: int = 1) -> Routing:
    """Ids one higher, so that padding with zeros is padding with -1; or lower again."""
    adapters = routing.adapter_ids
    return dataclasses.replace(routing, expert_ids=routing.expert_ids + more, adapter_ids=None if adapters is None else adapters + more)


def _own(parallel: ParallelConfig, rows: int, t: Tensor | None) -> Tensor | None:
    if parallel.sp is None or t is None:
        return t
    padded = torch.cat([t, t.new_zeros(rows - t.shape[0], *t.shape[1:])])
    return collectives.own_rows(padded, parallel.sp)
