"""Around a call of the layer: checks, tokens laid flat, autocast decided once; and the way back to the caller's shape
and dtype.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_fn.checks import check_per_token, check_untraced
from moe_fn.config import MoEConfig
from moe_fn.layer.compose import without_padding
from moe_fn.records import WEIGHT_PATHS, MoEWeights, Routing, leaves_of_weights, weights_of_leaves
from moe_fn.stages._checks import check_adapter_ids, check_token_inputs, check_x
from moe_fn.stages._routing_weights import without_padding as routing_without_padding
from moe_fn.torch_compat import autocast_around_graph, exporting, traces_switching_autocast
from moe_fn.weights.check import check_weights
from moe_fn.weights.prepare import convert_experts

_LEFT_ALONE = ("gate_up", "down", "router", "quant")  # by autocast: experts are converted apart, these others are not


@dataclass(frozen=True)
class Call:
    """One call's arguments: checked, tokens flat, padding cleared, in the dtype that the experts compute in."""

    weights: MoEWeights
    x: Tensor
    gate_x: Tensor  # what the gate inside the layer sees: x, under autocast perhaps not rounded
    logits: Tensor | None
    token_ids: Tensor | None
    token_mask: Tensor | None
    leading: tuple[int, ...]
    dtype: torch.dtype
    adapter_ids: Tensor | None = None
    where: str = "moe_forward"


def check_and_flatten(
    where: str,
    config: MoEConfig,
    weights: MoEWeights,
    x: Tensor,
    logits: Tensor | None,
    token_ids: Tensor | None,
    token_mask: Tensor | None,
    adapter_ids: Tensor | None = None,
    routed: bool = False,
    runs_experts: bool = True,
) -> Call:
    """The call, checked: ValueError for what does not fit.

    routed: by the caller; runs_experts: the call does not end at the router.
    """
    check_x(where, config, x)
    if not config.as_op:  # one op, whatever the sizes
        check_untraced(where, x.shape[0])
    low = autocast_dtype(x)
    check_weights(where, config, weights, x, any_dtype=low is not None)
    weights = weights if low is None else _in_autocast(config, weights, low, runs_experts)
    given, computed = x, x if low is None else x.to(low)
    if logits is not None:
        check_per_token(where, "logits", logits, x, ("num_logits", config.num_logits), "float")
    if not routed:
        token_ids = check_token_inputs(where, config, x, token_ids, token_mask)
    elif token_mask is not None:
        check_per_token(where, "token_mask", token_mask, x, None, "bool")
    adapter_ids = check_adapter_ids(where, config, x, adapter_ids)
    leading = tuple(x.shape[:-1])
    if x.ndim > 2:
        given, computed = given.flatten(0, -2), computed.flatten(0, -2)
        logits = None if logits is None else logits.flatten(0, -2)
        token_ids = None if token_ids is None else token_ids.flatten()
        token_mask = None if token_mask is None else token_mask.flatten()
    if adapter_ids is not None:
        adapter_ids = adapter_ids.flatten()
    computed = without_padding(computed, token_mask)
    unrounded = (
        low not in (None, x.dtype) and config.router.gate_dtype == "float32" and config.router.gate_input == "original"
    )
    gate_x = without_padding(given, token_mask) if unrounded and logits is None and not routed else computed
    return Call(weights, computed, gate_x, logits, token_ids, token_mask, leading, x.dtype, adapter_ids, where)


def restore_shape(call: Call, y: Tensor) -> Tensor:
    """The result in the shape and dtype of the caller's x."""
    y = without_padding(y, call.token_mask).to(call.dtype)
    return y if len(call.leading) == 1 else y.view(*call.leading, y.shape[-1])


def flat_routing(routing: Routing, call: Call) -> Routing:
    """A caller's routing, flat, with padding sent nowhere."""
    ids, weights, shared = routing.expert_ids, routing.weights, routing.shared_weights
    if ids.ndim > 2:
        ids, weights, shared = (
            ids.flatten(0, -2),
            weights.flatten(0, -2),
            None if shared is None else shared.flatten(0, -2),
        )
    routing = Routing(expert_ids=ids, weights=weights, shared_weights=shared, adapter_ids=call.adapter_ids)
    return routing if call.token_mask is None else routing_without_padding(routing, call.token_mask)


def autocast_off(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast is decided once, in check_and_flatten: left on, it would reach eager matmuls but not those inside
    compiled ops.
    """
    device = x.device.type
    if not _autocasts(x):
        return contextlib.nullcontext()
    if (
        torch.compiler.is_compiling()
        and not exporting()
        and autocast_around_graph(device)
        and traces_switching_autocast()
    ):
        return _switched_off(device)
    return torch.autocast(device, enabled=False)


@contextlib.contextmanager
def _switched_off(device: str) -> Iterator[None]:
    """What torch.autocast does, in calls that AOTAutograd's cache takes: its own enter and exit keep the whole graph
    out of the cache.

    Where torch.autocast stands in the compiled function itself, they do so already, and Dynamo (2.13) would undo these
    calls out of order.
    """
    torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, True)


def _autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is; there is none for meta tensors."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast asks to compute in; None without it, and for float64, which it leaves alone as
    everywhere in torch.
    """
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) and x.dtype != torch.float64 else None


def _in_autocast(config: MoEConfig, weights: MoEWeights, dtype: torch.dtype, runs_experts: bool) -> MoEWeights:
    """The weights that the call reads in autocast's dtype.

    The router's stay: a correction bias of bfloat16 could not be balanced. Codes and what stands beside them are no
    numbers to round.
    """
    if not runs_experts and config.router.gate_input == "original":
        return weights
    kept = [path[0] in _LEFT_ALONE or not (runs_experts or path[0] == "latent") for path in WEIGHT_PATHS]
    leaves = leaves_of_weights(weights)
    cast = weights_of_leaves([t if t is None or keep else t.to(dtype) for t, keep in zip(leaves, kept, strict=True)])
    return convert_experts(config, cast, dtype) if runs_experts else cast
