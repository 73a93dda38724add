"""Argument checks of the stages: shapes, dtypes and devices, which are Python values and add no node to the graph."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from moe_fn.checks import check_dtype, check_kind, check_per_token, check_untraced, checked_ids, sizes_of
from moe_fn.config import MoEConfig
from moe_fn.records import Dispatched, MoEWeights, RouterWeights, Routing
from moe_fn.weights.check import check_config, check_layer, check_weight, check_weights_of_experts
from moe_fn.weights.shapes import expected_weights

MOST_SLOTS = 2**31 - 1  # expert_ends is int32


def check_x(where: str, config: MoEConfig, x: Tensor) -> None:
    check_config(where, config)
    check_kind(where, "x", x, Tensor)
    if x.ndim < 2 or x.shape[-1] != config.hidden_size:
        raise ValueError(
            f"{where}: x is {sizes_of(x)}; expected (..., hidden_size) with hidden_size={config.hidden_size} and at "
            "least 2 dims"
        )
    if not x.dtype.is_floating_point:
        raise ValueError(f"{where}: x is {x.dtype}; expected a floating-point dtype")
    check_slots(where, math.prod(x.shape[:-1]), config.top_k)


def check_slots(where: str, tokens: int, top_k: int) -> None:
    # not while compiling, where the comparison would become a guard
    if not torch.compiler.is_compiling() and isinstance(tokens, int) and tokens * top_k > MOST_SLOTS:
        raise ValueError(
            f"{where}: x has {tokens} tokens, {tokens * top_k} slots with top_k={top_k}; expected at most {MOST_SLOTS}"
        )


def check_routing_inputs(
    config: MoEConfig, router: RouterWeights, logits: Tensor, token_ids: Tensor | None, token_mask: Tensor | None
) -> Tensor | None:
    """Checks the arguments of `route` and returns token_ids as int64."""
    check_kind("route", "logits", logits, Tensor)
    check_untraced("route", logits.ndim and logits.shape[0])
    if logits.ndim != 2 or logits.shape[-1] != config.num_logits:
        raise ValueError(
            f"route: logits is {sizes_of(logits)}; expected (tokens, num_logits) with num_logits={config.num_logits}"
        )
    check_dtype("route", "logits", logits, "float")
    token_ids = check_token_inputs("route", config, logits, token_ids, token_mask)
    _check_router("route", config, router, logits)
    return token_ids


_READ_BY_ROUTE = {("router", name) for name in ("correction_bias", "expert_scale", "expert_ids_of_token")}


def _check_router(where: str, config: MoEConfig, router: RouterWeights, logits: Tensor) -> None:
    for expected in expected_weights(config):
        if expected.path in _READ_BY_ROUTE:
            check_weight(where, expected, getattr(router, expected.path[1]), logits.device)


def check_choice_inputs(
    where: str, config: MoEConfig, router: RouterWeights, logits: Tensor, expert_ids: Tensor, token_mask: Tensor | None
) -> Tensor:
    """Checks the arguments of `route_to`, rejects routers whose weights need more than ids, returns ids as int64."""
    check_config(where, config)
    check_kind(where, "logits", logits, Tensor)
    if logits.ndim < 2 or logits.shape[-1] != config.num_logits:
        raise ValueError(
            f"{where}: logits is {sizes_of(logits)}; expected (..., num_logits) with num_logits={config.num_logits}"
        )
    check_dtype(where, "logits", logits, "float")
    expert_ids = checked_ids(where, "expert_ids", expert_ids, logits, ("top_k", config.top_k))
    if token_mask is not None:
        check_per_token(where, "token_mask", token_mask, logits, None, "bool")
    _check_router(where, config, router, logits)
    if config.router.selection == "sparsemixer":
        raise ValueError(
            f"{where}: the weights of selection='sparsemixer' depend on its own choice; expected 'top_k' or 'hash'"
        )
    if config.router.capacity is not None and config.router.renormalize:
        raise ValueError(
            f"{where}: capacity={config.router.capacity} with renormalize=True, whose norm includes dropped slots; "
            "expected capacity=None or renormalize=False"
        )
    return expert_ids


def check_token_inputs(
    where: str, config: MoEConfig, x: Tensor, token_ids: Tensor | None, token_mask: Tensor | None
) -> Tensor | None:
    """Checks token_mask and token_ids, which only hash routing takes; returns token_ids as int64."""
    hashed = config.router.selection == "hash"
    if hashed and token_ids is None:
        raise ValueError(f"{where}: token_ids is None; expected integer ids with router.selection='hash'")
    if token_ids is not None:
        if not hashed:
            raise ValueError(f"{where}: token_ids would have no effect; expected None, or router.selection='hash'")
        token_ids = checked_ids(where, "token_ids", token_ids, x, None)
    if token_mask is not None:
        check_per_token(where, "token_mask", token_mask, x, None, "bool")
    return token_ids


def check_adapter_ids(where: str, config: MoEConfig, x: Tensor, adapter_ids: Tensor | None) -> Tensor | None:
    """Checks adapter_ids and returns them as int64. Values are not checked: an id out of range means no adapter."""
    if adapter_ids is not None:
        if config.lora is None:
            raise ValueError(f"{where}: adapter_ids would have no effect; expected None, or MoEConfig.lora")
        return checked_ids(where, "adapter_ids", adapter_ids, x, None)
    if config.lora is not None and config.lora.num_adapters > 1:
        raise ValueError(
            f"{where}: adapter_ids is None; expected an id of the {config.lora.num_adapters} adapters for each token, "
            "-1 for none"
        )
    return None


def check_routing(where: str, config: MoEConfig, x: Tensor, routing: Routing) -> Routing:
    """Checks that a Routing fits the config and x; returns it with int64 expert_ids."""
    check_kind(where, "routing", routing, Routing)
    top_k = ("top_k", config.top_k)
    ids = checked_ids(where, "routing.expert_ids", routing.expert_ids, x, top_k)
    check_per_token(where, "routing.weights", routing.weights, x, top_k, "float")
    has_shared_weights = config.shared is not None and config.shared.gate == "router"
    if has_shared_weights != (routing.shared_weights is not None):
        raise ValueError(
            f"{where}: routing.shared_weights is {'None' if has_shared_weights else 'given'}; "
            "expected the opposite for this config"
        )
    if routing.shared_weights is not None and config.shared is not None:
        count = ("shared.count", config.shared.count)
        check_per_token(where, "routing.shared_weights", routing.shared_weights, x, count, "float")
    return with_ids(routing, ids)


def with_ids(routing: Routing, expert_ids: Tensor) -> Routing:
    """Returns the routing with these expert ids; the routing itself if it has them already."""
    return routing if expert_ids is routing.expert_ids else dataclasses.replace(routing, expert_ids=expert_ids)


_INDICES = (torch.int32, torch.int64)


def check_dispatch(config: MoEConfig, x: Tensor, routing: Routing) -> Routing:
    """Checks the arguments of `dispatch`; returns the routing with int64 ids."""
    check_config("dispatch", config)
    _check_rows("dispatch", "x", x, None)
    check_slots("dispatch", x.shape[0], config.top_k)
    check_kind("dispatch", "routing", routing, Routing)
    ids = checked_ids("dispatch", "routing.expert_ids", routing.expert_ids, x, ("top_k", config.top_k))
    if config.router.weight_on == "input":
        check_per_token("dispatch", "routing.weights", routing.weights, x, ("top_k", config.top_k), "float")
    routing = with_ids(routing, ids)
    if routing.adapter_ids is None:
        return routing
    adapters = checked_ids("dispatch", "routing.adapter_ids", routing.adapter_ids, x, None)
    return routing if adapters is routing.adapter_ids else dataclasses.replace(routing, adapter_ids=adapters)


def check_experts(config: MoEConfig, weights: MoEWeights, dispatched: Dispatched) -> None:
    check_layer("experts", config, weights)
    check_kind("experts", "dispatched", dispatched, Dispatched)
    _check_rows("experts", "dispatched.rows", dispatched.rows, ("expert_hidden_size", config.expert_hidden_size))
    if not dispatched.rows.dtype.is_floating_point:
        raise ValueError(f"experts: dispatched.rows is {dispatched.rows.dtype}; expected a floating-point dtype")
    ends, count = dispatched.expert_ends, config.own.num_experts
    check_kind("experts", "dispatched.expert_ends", ends, Tensor)
    if ends.dtype != torch.int32 or tuple(ends.shape) != (count,):
        raise ValueError(
            f"experts: dispatched.expert_ends is {ends.dtype} {list(ends.shape)}; "
            f"expected torch.int32 [num_experts] = [{count}]"
        )
    check_weights_of_experts("experts", config, weights, dispatched.rows)


def check_combine(config: MoEConfig, rows: Tensor, dispatched: Dispatched, routing: Routing) -> Routing:
    """Checks the arguments of `combine`; returns the routing with int64 ids."""
    check_config("combine", config)
    _check_rows("combine", "rows", rows, None)
    check_kind("combine", "dispatched", dispatched, Dispatched)
    check_kind("combine", "routing", routing, Routing)
    maps = {"slot_of_row": dispatched.slot_of_row, "row_of_slot": dispatched.row_of_slot}
    for name, map_ in maps.items():
        check_kind("combine", f"dispatched.{name}", map_, Tensor)
        if map_.ndim != 1 or map_.dtype not in _INDICES:
            raise ValueError(f"combine: dispatched.{name} is {map_.dtype} {list(map_.shape)}; expected int64 [rows]")
    _check_rows("combine", "routing.expert_ids", routing.expert_ids, ("top_k", config.top_k))
    ids = checked_ids("combine", "routing.expert_ids", routing.expert_ids, routing.expert_ids, ("top_k", config.top_k))
    if config.router.weight_on == "output":
        check_per_token(
            "combine", "routing.weights", routing.weights, routing.expert_ids, ("top_k", config.top_k), "float"
        )
    sizes = {"rows": rows.shape[0], "routing.expert_ids": routing.expert_ids.shape[0] * config.top_k}
    sizes |= {f"dispatched.{name}": map_.shape[0] for name, map_ in maps.items()}
    if not torch.compiler.is_compiling() and len(set(sizes.values())) > 1:
        raise ValueError(
            f"combine: {', '.join(f'{name} has {size} slots' for name, size in sizes.items())}; expected equal numbers"
        )
    return with_ids(routing, ids)


def check_reduce(y: Tensor, width: Any) -> None:
    check_kind("reduce_and_trunc", "y", y, Tensor)
    if y.ndim < 1:
        raise ValueError("reduce_and_trunc: y has no dims; expected at least 1")
    if width is not None and (not isinstance(width, int | torch.SymInt) or isinstance(width, bool) or width < 0):
        raise ValueError(f"reduce_and_trunc: width is {width!r}; expected a number of columns, or None")


def _check_rows(where: str, name: str, rows: Tensor, columns: tuple[str, int] | None) -> None:
    check_kind(where, name, rows, Tensor)
    check_untraced(where, rows.ndim and rows.shape[0])
    if rows.ndim != 2 or (columns is not None and rows.shape[1] != columns[1]):
        wanted = "2 dims" if columns is None else f"(..., {columns[0]}) with {columns[0]}={columns[1]} and 2 dims"
        raise ValueError(f"{where}: {name} is {tuple(rows.shape)}; expected {wanted}")
