"""The public MoE layer: `moe_forward` and its variants, from tokens, weights and logits to outputs.

`layer.call` checks and flattens the arguments, `layer.compose` computes; this module chooses between eager stages, a
scan over chunks of tokens, one op, and several ranks.
"""

import dataclasses

from torch import Tensor

from moe_fn.balance import stats_of_routing
from moe_fn.config import MoEConfig
from moe_fn.layer.call import Call, autocast_off, check_and_flatten, flat_routing, restore_shape
from moe_fn.layer.chunked import layer_in_chunks, loop_is_visible
from moe_fn.layer.compose import layer_with_overflow, parts_of_tokens, route_tokens
from moe_fn.layer.opaque import layer_as_op
from moe_fn.parallel.dispatch import can_drop_slots
from moe_fn.parallel.sizes import reads_sizes
from moe_fn.records import MoEWeights, Routing, RoutingStats
from moe_fn.stages._checks import check_routing, check_x
from moe_fn.torch_compat import scalars_allowed


def moe_forward(
    config: MoEConfig,
    weights: MoEWeights,
    x: Tensor,
    logits: Tensor | None = None,
    *,
    token_ids: Tensor | None = None,
    token_mask: Tensor | None = None,
    adapter_ids: Tensor | None = None,
) -> Tensor:
    """The Mixture-of-Experts layer.

        y[t] = sum over j of  w[t, j] * expert_{ids[t, j]}(x[t]) + shared(x[t]) + zero experts, (ids, w) = route(logits)

    x            [..., H] float
    logits       [..., num_logits] float; None: x @ weights.router.gate.T + bias
    token_ids    [...] integers, for hash routing
    token_mask   [...] bool, False for padding; padding may hold any values, NaN too, and its outputs are zeros
    adapter_ids  [...] integers, the LoRA adapter of each token; ids out of range, such as -1: no adapter; None: adapter
                 0 for all tokens, where the layer has one adapter

    Returns [..., H] in x.dtype, also under autocast, which sets the dtype that the experts compute in. A float32 gate
    reads x before autocast rounds it.

    Raises ValueError at trace time: where, what came, what was expected. Under fullgraph=True torch wraps it in its own
    error.

    Laws
        The layer equals the reference.
        Gradients equal the reference.
        The layer commutes with permuting tokens.
        Relabelling experts changes nothing.
        Concatenated batches give concatenated outputs.
        The layer is linear in the routing weights.
        Choosing all experts gives the dense mixture.
        Garbage in padding never reaches the output.
        Non-finite values of a token affect no other token.
        NaN in a token is NaN in its output.
        Non-finite weights of an expert affect only its tokens.
        Non-finite values do not reach gradients of other tokens.
        Chunked equals unchunked.
        Opaque equals transparent.
        Autocast does not round a float32 gate.
        Autocast equals weights in its dtype.
        Flattening leading dimensions changes nothing.
        Inputs are never written to.
        The same inputs give the same bits.
        A batch invariant token has the same bits in any batch.
        A batch invariant gradient has the same bits in any batch.

    Source: Shazeer et al. 2017 (arXiv 1701.06538); every published variant in `MoEConfig`.

    >>> import torch
    >>> from moe_fn import MoEConfig, MoEWeights
    >>> config = MoEConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=128)
    >>> weights = MoEWeights(gate_up=torch.randn(8, 256, 64) / 8, down=torch.randn(8, 64, 128) / 12)
    >>> moe_forward(config, weights, torch.randn(5, 64), torch.randn(5, 8)).shape
    torch.Size([5, 64])
    """
    call = check_and_flatten("moe_forward", config, weights, x, logits, token_ids, token_mask, adapter_ids)
    with autocast_off(x):
        logits, routing = (call.logits, None) if _routes_inside(config) else _route(config, call)
        (y,) = _run(config, call, logits, routing, with_shared=False)
        return restore_shape(call, y)


def moe_forward_shared(
    config: MoEConfig,
    weights: MoEWeights,
    x: Tensor,
    logits: Tensor | None = None,
    *,
    token_ids: Tensor | None = None,
    token_mask: Tensor | None = None,
    adapter_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (shared, routed), whose sum is moe_forward: for callers that reduce or overlap the two separately.

    Takes the arguments and raises the errors of moe_forward. Without shared experts, shared is zeros. With opaque=True
    it is one node, as moe_forward is.

    Laws
        Shared and routed add up to the layer.

    >>> import torch
    >>> from moe_fn import MoEConfig, MoEWeights
    >>> config = MoEConfig(num_experts=2, top_k=1, hidden_size=4, intermediate_size=4)
    >>> weights = MoEWeights(gate_up=torch.randn(2, 8, 4), down=torch.randn(2, 4, 4))
    >>> shared, routed = moe_forward_shared(config, weights, torch.randn(5, 4), torch.randn(5, 2))
    >>> shared.count_nonzero().item(), routed.shape
    (0, torch.Size([5, 4]))
    """
    if isinstance(config, MoEConfig) and config.parallel is not None:
        raise ValueError(
            "moe_forward_shared: MoEConfig.parallel reduces routed and shared together; expected None, or moe_forward"
        )
    if isinstance(config, MoEConfig) and config.norms is not None and config.norms.output:
        raise ValueError(
            "moe_forward_shared: MoEConfig.norms.output=True normalizes their sum; expected False, or moe_forward"
        )
    call = check_and_flatten("moe_forward_shared", config, weights, x, logits, token_ids, token_mask, adapter_ids)
    with autocast_off(x):
        logits, routing = (call.logits, None) if _routes_inside(config) else _route(config, call)
        shared, routed = _run(config, call, logits, routing, with_shared=True)
        return restore_shape(call, shared), restore_shape(call, routed)


def moe_forward_routed(
    config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing, *, token_mask: Tensor | None = None
) -> Tensor:
    """The layer after a router of your own: an id of -1 means no expert, weights may be any numbers.

    x [..., H], routing.expert_ids and .weights [..., top_k] -> [..., H]. Raises the errors of moe_forward.

    Laws
        Any routing equals the reference.
        Ids of any integer dtype are the same ids.

    >>> import torch
    >>> from moe_fn import MoEConfig, MoEWeights
    >>> config = MoEConfig(num_experts=2, top_k=1, hidden_size=4, intermediate_size=4)
    >>> weights = MoEWeights(gate_up=torch.randn(2, 8, 4), down=torch.randn(2, 4, 4))
    >>> routing = Routing(expert_ids=torch.tensor([[0], [-1]]), weights=torch.ones(2, 1))
    >>> moe_forward_routed(config, weights, torch.randn(2, 4), routing)[1].tolist()
    [0.0, 0.0, 0.0, 0.0]
    """
    check_x("moe_forward_routed", config, x)
    routing = check_routing("moe_forward_routed", config, x, routing)
    call = check_and_flatten(
        "moe_forward_routed", config, weights, x, None, None, token_mask, routing.adapter_ids, routed=True
    )
    with autocast_off(x):
        (y,) = _run(config, call, None, flat_routing(routing, call), with_shared=False)
        return restore_shape(call, y)


def moe_route(
    config: MoEConfig,
    weights: MoEWeights,
    x: Tensor,
    logits: Tensor | None = None,
    *,
    token_ids: Tensor | None = None,
    token_mask: Tensor | None = None,
    adapter_ids: Tensor | None = None,
) -> tuple[Tensor, Routing]:
    """Returns (logits, routing), the first half of moe_forward; moe_forward_routed is the second half.

    Takes the arguments and raises the errors of moe_forward. logits [..., num_logits] are the argument, or the output
    of the gate; routing has ids and weights [..., top_k].

    Laws
        Routing and then the routed layer give the layer.

    >>> import torch
    >>> from moe_fn import MoEConfig, MoEWeights
    >>> config = MoEConfig(num_experts=2, top_k=1, hidden_size=4, intermediate_size=4)
    >>> weights = MoEWeights(gate_up=torch.randn(2, 8, 4), down=torch.randn(2, 4, 4))
    >>> moe_route(config, weights, torch.randn(3, 4), torch.tensor([[0.0, 1.0]] * 3))[1].expert_ids.flatten().tolist()
    [1, 1, 1]
    """
    call = check_and_flatten(
        "moe_route", config, weights, x, logits, token_ids, token_mask, adapter_ids, runs_experts=False
    )
    with autocast_off(x):
        logits, routing = _route(config, call)
        parts = (logits, routing.expert_ids, routing.weights, routing.shared_weights)
        logits, ids, w, shared = (None if t is None else t.view(*call.leading, t.shape[-1]) for t in parts)
        return logits, Routing(expert_ids=ids, weights=w, shared_weights=shared, adapter_ids=adapter_ids)  # type: ignore[return-value, arg-type]


def moe_forward_with_stats(
    config: MoEConfig,
    weights: MoEWeights,
    x: Tensor,
    logits: Tensor | None = None,
    *,
    token_ids: Tensor | None = None,
    token_mask: Tensor | None = None,
    adapter_ids: Tensor | None = None,
) -> tuple[Tensor, RoutingStats]:
    """Returns (output of moe_forward, routing statistics): load per expert, dropped slots, balancing losses.

    Takes the arguments and raises the errors of moe_forward. The second to last dimension of x is the sequence of
    sequence_balancing_loss. No state is kept.

    Laws
        Stats do not change the output.
        Expert load counts the slots.

    >>> import torch
    >>> from moe_fn import MoEConfig, MoEWeights
    >>> config = MoEConfig(num_experts=2, top_k=1, hidden_size=4, intermediate_size=4)
    >>> weights = MoEWeights(gate_up=torch.randn(2, 8, 4), down=torch.randn(2, 4, 4))
    >>> y, stats = moe_forward_with_stats(config, weights, torch.randn(3, 4), torch.tensor([[0.0, 1.0]] * 3))
    >>> stats.expert_load.tolist()
    [0, 3]
    """
    call = check_and_flatten("moe_forward_with_stats", config, weights, x, logits, token_ids, token_mask, adapter_ids)
    with autocast_off(x):
        logits, routing = _route(config, call)
        stats = stats_of_routing(config, logits, routing, call.token_mask, tuple(x.shape[:-1]))
        if config.parallel is not None and can_drop_slots(config):
            y, overflow = layer_with_overflow(config, call.weights, call.x, routing)
            if overflow is not None:
                stats = dataclasses.replace(stats, dropped_slots=stats.dropped_slots + overflow)
            return restore_shape(call, y), stats
        # With batch_invariant the op routes again: bits of a routing in the graph would depend on compiled code.
        again = config.batch_invariant and _routes_inside(config)
        (y,) = _run(config, call, call.logits if again else logits, None if again else routing, with_shared=False)
        return restore_shape(call, y), stats


def _route(config: MoEConfig, call: Call) -> tuple[Tensor, Routing]:
    logits, routing = route_tokens(
        config, call.weights, call.gate_x, call.logits, call.token_ids, call.token_mask, call.leading
    )
    return logits, dataclasses.replace(routing, adapter_ids=call.adapter_ids)


def _routes_inside(config: MoEConfig) -> bool:
    """Whether the whole-layer op routes. A router capacity counts within sequences, and the op's tokens are flat."""
    return config.as_op and config.router.capacity is None and config.parallel is None


def _run(
    config: MoEConfig, call: Call, logits: Tensor | None, routing: Routing | None, with_shared: bool
) -> tuple[Tensor, ...]:
    """Everything after the router; with routing=None the op routes from logits, or from its gate."""
    if config.parallel is not None and routing is not None:
        return (_run_over_ranks(config, call, logits, routing),)
    chunked = config.chunk_tokens is not None
    if routing is None or config.as_op or (chunked and not loop_is_visible()):
        pending = (logits, call.token_ids, call.token_mask) if routing is None else (None, None, None)
        gate_x = None if routing is not None or call.gate_x is call.x else call.gate_x
        return layer_as_op(config, call.weights, call.x, routing, *pending, call.adapter_ids, with_shared, gate_x)
    if chunked:
        return layer_in_chunks(config, call.weights, call.x, routing, with_shared)
    if with_shared:
        return parts_of_tokens(config, call.weights, call.x, routing)
    return layer_with_overflow(config, call.weights, call.x, routing)[:1]


def _run_over_ranks(config: MoEConfig, call: Call, logits: Tensor | None, routing: Routing) -> Tensor:
    if config.parallel is None or can_drop_slots(config):
        other = "" if call.where == "moe_forward_routed" else ", or moe_forward_with_stats, which returns how many"
        raise ValueError(
            f"{call.where}: ParallelConfig.capacity can drop slots; expected None, which has room for every slot{other}"
        )
    # The caller's own routing has no logits: then ranks exchange the routing.
    sent = logits if config.parallel.gather == "logits" else None
    if config.batch_invariant or (reads_sizes(config.parallel) and not scalars_allowed()):
        return layer_as_op(config, call.weights, call.x, routing, sent, None, None, call.adapter_ids, False)[0]
    return layer_with_overflow(config, call.weights, call.x, routing, sent)[0]
