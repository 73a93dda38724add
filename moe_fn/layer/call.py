"""Checks and flattens the tokens of a call, applies autocast once, and restores the caller's shape and dtype."""

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

# Not cast by _in_autocast's general rule: convert_experts casts gate_up and down, router and quant keep their dtypes.
_NOT_CAST = ("gate_up", "down", "router", "quant")


@dataclass(frozen=True)
class Call:
    """Arguments of one call: checked, tokens flattened, padding zeroed, in the dtype that the experts compute in."""

    weights: MoEWeights
    x: Tensor
    gate_x: Tensor  # input of the gate inside the layer: x, under autocast not rounded for a float32 gate
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
    """Checks the arguments and returns them with flat tokens; raises ValueError.

    routed: the caller has routed. runs_experts: False if the call ends after the router.
    """
    check_x(where, config, x)
    if not config.as_op:  # torch.jit.trace can record the op, which works for all sizes
        check_untraced(where, x.shape[0])
    low = autocast_dtype(x)
    check_weights(where, config, weights, x, any_dtype=low is not None)
    weights = weights if low is None else _in_autocast(config, weights, low, runs_experts)
    original, computed = x, x if low is None else x.to(low)
    if logits is not None:
        check_per_token(where, "logits", logits, x, ("num_logits", config.num_logits), "float")
    if not routed:
        token_ids = check_token_inputs(where, config, x, token_ids, token_mask)
    elif token_mask is not None:
        check_per_token(where, "token_mask", token_mask, x, None, "bool")
    adapter_ids = check_adapter_ids(where, config, x, adapter_ids)
    leading = tuple(x.shape[:-1])
    if x.ndim > 2:
        original, computed = original.flatten(0, -2), computed.flatten(0, -2)
        logits = None if logits is None else logits.flatten(0, -2)
        token_ids = None if token_ids is None else token_ids.flatten()
        token_mask = None if token_mask is None else token_mask.flatten()
    if adapter_ids is not None:
        adapter_ids = adapter_ids.flatten()
    computed = without_padding(computed, token_mask)
    unrounded = (
        low not in (None, x.dtype) and config.router.gate_dtype == "float32" and config.router.gate_input == "original"
    )
    gate_x = without_padding(original, token_mask) if unrounded and logits is None and not routed else computed
    return Call(weights, computed, gate_x, logits, token_ids, token_mask, leading, x.dtype, adapter_ids, where)


def restore_shape(call: Call, y: Tensor) -> Tensor:
    """Returns y in the shape and dtype of the caller's x, with zeros for padding."""
    y = without_padding(y, call.token_mask).to(call.dtype)
    return y if len(call.leading) == 1 else y.view(*call.leading, y.shape[-1])


def flat_routing(routing: Routing, call: Call) -> Routing:
    """Returns the caller's routing with flat tokens, and ids -1 for padding."""
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
    """Disables autocast around the layer: check_and_flatten has cast the inputs. Left on, autocast would cast inputs of
    eager matmuls but not of matmuls inside ops.
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
    """torch.autocast(enabled=False), written with calls that AOTAutograd can cache: a graph with enter and exit of
    torch.autocast is never cached.

    Only for autocast around the compiled function. With torch.autocast inside of it the graph is not cached anyway, and
    Dynamo (2.13) would restore these calls in the wrong order.
    """
    torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, True)


def _autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; meta tensors have no autocast."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Returns the dtype of autocast; None if it is off, and for float64, which autocast never casts."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) and x.dtype != torch.float64 else None


def _in_autocast(config: MoEConfig, weights: MoEWeights, dtype: torch.dtype, runs_experts: bool) -> MoEWeights:
    """Returns the weights that the call reads, cast to autocast's dtype.

    Router weights keep their dtype: bias updates of balancing would vanish in a bfloat16 correction bias. Codes, scales
    and zero points are not cast.
    """
    if not runs_experts and config.router.gate_input == "original":
        return weights
    kept = [path[0] in _NOT_CAST or not (runs_experts or path[0] == "latent") for path in WEIGHT_PATHS]
    leaves = leaves_of_weights(weights)
    cast = weights_of_leaves([t if t is None or keep else t.to(dtype) for t, keep in zip(leaves, kept, strict=True)])
    return convert_experts(config, cast, dtype) if runs_experts else cast
