"""The composition of the stages on flat tokens, for one rank and for many, and the sums over ranks.

`moe_fn.stages` has a picture. `moe_fn.parallel.dispatch` has one function for each format of dispatch between ranks;
`moe_fn.forward` has the public functions.
"""

import dataclasses
import functools

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from moe_fn.config import MoEConfig, RankGroup
from moe_fn.fused.route import _route
from moe_fn.ops import collectives
from moe_fn.parallel.adapters import adapters_of_each
from moe_fn.parallel.dispatch import FORMATS, Overflow, can_drop_slots
from moe_fn.parallel.expert_ranks import WEIGHTS_OF_EACH
from moe_fn.records import MoEWeights, Routing
from moe_fn.stages.join import addends, join
from moe_fn.stages.reduce_and_trunc import reduce_and_trunc
from moe_fn.stages.route import router_logits
from moe_fn.stages.shared import shared_experts
from moe_fn.stages.transform import norm_for_gate, norm_output, transform_input, transform_output
from moe_fn.stages.zero_experts import zero_experts


def logits_of_tokens(config: MoEConfig, weights: MoEWeights, x: Tensor) -> Tensor:
    """Returns the logits of the gate inside the layer, from x or from the input of the experts (router.gate_input)."""
    gate_x = norm_for_gate(config, x) if config.router.gate_input == "original" else transform_input(config, weights, x)
    return router_logits(config, weights, gate_x)


def route_tokens(
    config: MoEConfig,
    weights: MoEWeights,
    x: Tensor,
    logits: Tensor | None,
    token_ids: Tensor | None,
    token_mask: Tensor | None,
    leading: tuple[int, ...] | None = None,
) -> tuple[Tensor, Routing]:
    """Returns (logits, routing), from the caller's logits or from the gate inside the layer."""
    logits = logits_of_tokens(config, weights, x) if logits is None else logits
    return logits, _route(config, weights, logits, token_ids, token_mask, leading)


def layer_with_overflow(
    config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing, logits: Tensor | None = None
) -> tuple[Tensor, Overflow]:
    """Returns (y, number of slots dropped by ParallelConfig.capacity, or None).

    Sums over ranks:

        dispatch              over ep                       over tp
        None (one rank)       -                             -
        replicated            after the experts             late: one sum of routed + shared
        all_gather            reduce-scatter of tokens      late
        all_gather without ep reduce-scatter over dp        late
        all_to_all (static)   on the token's rank           late
        any, with a latent space or replicated              early: of the routed part, before transform_output
        shared experts                                      (which need not be linear, and whose bias is added once);
                                                            sharded shared experts are summed separately
        any, with sp          as above                      no sum: rows are concatenated at the end

    Zero experts and the norm of the output come once, after all sums. Gradients of weights that all ranks of tp (or sp)
    have are complete on each of them. On ranks with different tokens (ep, dp) each gradient covers the rank's own
    tokens, as in data parallelism.

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
    if overflow is not None and can_drop_slots(config):  # counted over this rank's rows only
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
    """Returns (routed, shared, overflow): the two addends of the layer, before the late sum over tp if there is one.
    shared is None without shared experts.
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
    """Returns (shared, routed), whose sum is the layer; for one rank."""
    routed, shared, _ = routed_and_shared(config, weights, x, routing)
    return torch.zeros_like(routed) if shared is None else shared, zero_experts(config, weights, x, routing, routed)


def outputs_of_tokens(
    config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing, with_shared: bool, logits: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Returns (y,) of the layer; with_shared: (shared, routed), whose sum it is."""
    if with_shared:
        return parts_of_tokens(config, weights, x, routing)
    return layer_with_overflow(config, weights, x, routing, logits)[:1]


def without_padding(x: Tensor, token_mask: Tensor | None) -> Tensor:
    """Returns x with zeros for padding tokens, so that NaN in padding reaches neither outputs nor gradients."""
    return x if token_mask is None else torch.where(token_mask.unsqueeze(-1), x, 0)


def _tp(config: MoEConfig) -> RankGroup | None:
    return None if config.parallel is None else config.parallel.tp


def _tp_of_shared(config: MoEConfig) -> RankGroup | None:
    """Returns the ranks that have slices of the shared experts."""
    return config.parallel.tp if config.parallel is not None and config.parallel.shared == "sharded" else None


def _sums_late(config: MoEConfig) -> bool:
    """Whether one sum over tp, of routed + shared, is correct."""
    return config.latent is None and (config.shared is None or _tp_of_shared(config) is not None)


def _shared(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> Tensor | None:
    """The shared experts' output; of sharded ones this rank's addend of the sum over tp."""
    tp, dense = _tp_of_shared(config), weights.shared
    if tp is not None and dense is not None:
        gate, by_router = (
            None if t is None else collectives.copy_to_ranks(t, tp) for t in (dense.gate, routing.shared_weights)
        )
        weights = dataclasses.replace(weights, shared=dataclasses.replace(dense, gate=gate))
        x, routing = collectives.copy_to_ranks(x, tp), dataclasses.replace(routing, shared_weights=by_router)
    return shared_experts(config, weights, x, routing)


def _used_by_each(sp: RankGroup, weights: MoEWeights) -> MoEWeights:
    """Returns the weights with gradients summed over sp, for weights that every rank of sp applies to its own rows."""

    def copied(t: Tensor | None) -> Tensor | None:
        return None if t is None else collectives.copy_to_ranks(t, sp)

    return dataclasses.replace(weights, **{name: tree_map(copied, getattr(weights, name)) for name in WEIGHTS_OF_EACH})


def _no_expert_as_zero(routing: Routing, more: int = 1) -> Routing:
    """Adds 1 to ids, so that zero padding means no expert; more=-1 undoes it."""
    adapters = routing.adapter_ids
    return dataclasses.replace(
        routing, expert_ids=routing.expert_ids + more, adapter_ids=None if adapters is None else adapters + more
    )


def _own_rows(sp: RankGroup, rows: int, t: Tensor | None) -> Tensor | None:
    """Returns this rank's rows of a per-token tensor that is padded with zeros to `rows`, a multiple of sp's size."""
    return None if t is None else collectives.own_rows(torch.cat([t, t.new_zeros(rows - t.shape[0], *t.shape[1:])]), sp)
