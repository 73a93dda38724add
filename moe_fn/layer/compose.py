"""The layer on flat tokens, of one rank and of many: the stages in the order of the contract, and who sums what.

The picture is in `moe_fn.stages`. `moe_fn.parallel.dispatch` has the middle, one function for each way in which tokens
find their experts; `moe_fn.forward` puts the public shape around it.
"""

import dataclasses
import functools

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from moe_fn.config import MoEConfig, RankGroup
from moe_fn.ops import collectives
from moe_fn.parallel.adapters import adapters_of_each
from moe_fn.parallel.dispatch import FORMATS, Overflow, can_drop_slots
from moe_fn.parallel.expert_ranks import WEIGHTS_OF_EACH
from moe_fn.records import MoEWeights, Routing
from moe_fn.stages.join import addends, join
from moe_fn.stages.reduce_and_trunc import reduce_and_trunc
from moe_fn.stages.route import _route, router_logits
from moe_fn.stages.shared import shared_experts
from moe_fn.stages.transform import norm_for_gate, norm_output, transform_input, transform_output
from moe_fn.stages.zero_experts import zero_experts


def logits_of_tokens(config: MoEConfig, weights: MoEWeights, x: Tensor) -> Tensor:
    """Logits of the gate inside the layer, from x or from what the experts see."""
    seen = norm_for_gate(config, x) if config.router.gate_input == "original" else transform_input(config, weights, x)
    return router_logits(config, weights, seen)


def route_tokens(
    config: MoEConfig,
    weights: MoEWeights,
    x: Tensor,
    logits: Tensor | None,
    token_ids: Tensor | None,
    token_mask: Tensor | None,
    leading: tuple[int, ...] | None = None,
) -> tuple[Tensor, Routing]:
    """(logits, routing), from the logits given or from the gate inside the layer."""
    logits = logits_of_tokens(config, weights, x) if logits is None else logits
    return logits, _route(config, weights, logits, token_ids, token_mask, leading)


def layer_of_tokens(
    config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing, logits: Tensor | None = None
) -> Tensor:
    """Everything behind the router, for this rank's tokens.

    With logits they travel between ranks, and every rank routes by them.
    """
    return layer_with_overflow(config, weights, x, routing, logits)[0]


def layer_with_overflow(
    config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing, logits: Tensor | None = None
) -> tuple[Tensor, Overflow]:
    """(y, how many slots found no room, where a capacity of ParallelConfig counts them).

    Who sums what, and when:

        dispatch              over ep                       over tp
        None (one rank)       -                             -
        replicated            right after the experts       late: once, of routed + shared
        all_gather            scattered, with the tokens    late
        all_gather without ep, over dp: scattered           late
        all_to_all (static)   at the token's own rank       late
        any, with a latent space or replicated              early: the routed part alone, before its output transform
        shared experts                                      (which need not be linear, and whose bias counts once);
                                                            sharded shared experts by themselves
        any, with sp          as above                      rows are joined at the end, nothing is summed

    Zero experts and the norm of the output come after every sum, once. Gradients of weights that all ranks of tp (of
    sp) have are complete on each of them; of those that ranks with other tokens have (ep, dp) each has its tokens'
    part, as in data parallelism.

    Laws
        Sharded equals unsharded.
    """
    if config.parallel is None:
        return _layer(config, weights, x, routing, logits)
    weights, sp = dataclasses.replace(weights, lora=adapters_of_each(config, weights.lora)), config.parallel.sp
    if sp is None:
        return _layer(config, weights, x, routing, logits)
    tokens = x.shape[0]
    rows = -(-tokens // sp.size) * sp.size
    x, routing, logits = (
        tree_map(functools.partial(_own_rows, sp, rows), part) for part in (x, _no_expert_as_zero(routing), logits)
    )
    y, overflow = _layer(config, _used_by_each(sp, weights), x, _no_expert_as_zero(routing, -1), logits)
    if overflow is not None and can_drop_slots(config):  # of this rank's rows; the tokens are everybody's
        overflow = collectives.reduced_over_ranks(overflow, "sum", sp.name)
    return collectives.join_rows(y, sp).narrow(0, 0, tokens), overflow


def _layer(
    config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing, logits: Tensor | None
) -> tuple[Tensor, Overflow]:
    routed, shared, overflow = routed_and_shared(config, weights, x, routing, logits)
    y = reduce_and_trunc(join(routed, shared), group=_tp(config) if _sums_late(config) else None)
    return norm_output(config, weights, zero_experts(config, weights, x, routing, y)), overflow


def routed_and_shared(
    config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing, logits: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Overflow]:
    """The two addends of the layer (shared: None without shared experts), still to be summed over tp where that is done
    late; overflow.
    """
    tp, dispatch = _tp(config), None if config.parallel is None else config.parallel.dispatch
    v = collectives.copy_to_ranks(transform_input(config, weights, x), tp)
    sent = (
        routing if tp is None else dataclasses.replace(routing, weights=collectives.copy_to_ranks(routing.weights, tp))
    )
    logits = None if logits is None else collectives.copy_to_ranks(logits, tp)
    shared_fn = functools.partial(_shared, config, weights, x, routing)
    routed, shared, overflow = FORMATS[dispatch](config, weights, v, sent, logits, shared_fn)
    routed = reduce_and_trunc(routed, width=config.routed_size)
    if not _sums_late(config):
        routed = reduce_and_trunc(routed, group=tp)
        shared = None if shared is None else reduce_and_trunc(shared, group=_tp_of_shared(config))
    return *addends(config, routed, shared, functools.partial(transform_output, config, weights)), overflow


def parts_of_tokens(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """(shared, routed), whose sum is layer_of_tokens; of one rank."""
    routed, shared, _ = routed_and_shared(config, weights, x, routing)
    return torch.zeros_like(routed) if shared is None else shared, zero_experts(config, weights, x, routing, routed)


def outputs_of_tokens(
    config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing, with_shared: bool, logits: Tensor | None = None
) -> tuple[Tensor, ...]:
    """(y,) of layer_of_tokens, or with_shared (shared, routed) of parts_of_tokens."""
    return (
        parts_of_tokens(config, weights, x, routing)
        if with_shared
        else (layer_of_tokens(config, weights, x, routing, logits),)
    )


def without_padding(x: Tensor, token_mask: Tensor | None) -> Tensor:
    """Zeros in the rows of padding tokens, whatever they held: NaN there must reach neither outputs nor gradients."""
    return x if token_mask is None else torch.where(token_mask.unsqueeze(-1), x, 0)


def _tp(config: MoEConfig) -> RankGroup | None:
    return None if config.parallel is None else config.parallel.tp


def _tp_of_shared(config: MoEConfig) -> RankGroup | None:
    """The ranks that have slices of the shared experts."""
    return config.parallel.tp if config.parallel is not None and config.parallel.shared == "sharded" else None


def _sums_late(config: MoEConfig) -> bool:
    """Whether one sum over tp, of routed + shared, is enough."""
    return config.latent is None and (config.shared is None or _tp_of_shared(config) is not None)


def _shared(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> Tensor | None:
    """The shared experts, or this rank's slice of them, a part of a sum over tp."""
    tp, dense = _tp_of_shared(config), weights.shared
    if tp is not None and dense is not None:
        gate, by_router = (
            None if t is None else collectives.copy_to_ranks(t, tp) for t in (dense.gate, routing.shared_weights)
        )
        weights = dataclasses.replace(weights, shared=dataclasses.replace(dense, gate=gate))
        x, routing = collectives.copy_to_ranks(x, tp), dataclasses.replace(routing, shared_weights=by_router)
    return shared_experts(config, weights, x, routing)


def _used_by_each(sp: RankGroup, weights: MoEWeights) -> MoEWeights:
    """Weights that every rank of sp has and uses for its own rows: their gradients are sums over sp."""

    def copied(t: Tensor | None) -> Tensor | None:
        return None if t is None else collectives.copy_to_ranks(t, sp)

    return dataclasses.replace(weights, **{name: tree_map(copied, getattr(weights, name)) for name in WEIGHTS_OF_EACH})


def _no_expert_as_zero(routing: Routing, more: int = 1) -> Routing:
    """Ids one higher, so that padding with zeros is padding with -1; or lower again."""
    adapters = routing.adapter_ids
    return dataclasses.replace(
        routing, expert_ids=routing.expert_ids + more, adapter_ids=None if adapters is None else adapters + more
    )


def _own_rows(sp: RankGroup, rows: int, t: Tensor | None) -> Tensor | None:
    """This rank's part of tensors that belong to tokens, of which zeros make `rows`, as many on each rank."""
    return None if t is None else collectives.own_rows(torch.cat([t, t.new_zeros(rows - t.shape[0], *t.shape[1:])]), sp)
