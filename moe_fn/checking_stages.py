"""What stages read, checked where they are called alone; in a graph, sizes that depend on the number of tokens are left to torch."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from moe_fn.checking import check_beside_x, check_slots, check_weights_of_experts, checked_ids, with_ids
from moe_fn.config import MoEConfig
from moe_fn.kinds import check_config, check_kind, check_layer, check_untraced
from moe_fn.records import Dispatched, MoEWeights, Routing

_INDICES = (torch.int32, torch.int64)


def check_dispatch(config: MoEConfig, x: Tensor, routing: Routing) -> Routing:
    """The routing, its ids as int64."""
    check_config("dispatch", config)
    _check_rows("dispatch", "x", x, None)
    check_slots("dispatch", x.shape[0], config.top_k)
    check_kind("dispatch", "routing", routing, Routing)
    ids = checked_ids("dispatch", "routing.expert_ids", routing.expert_ids, x, ("top_k", config.top_k))
    if config.router.weight_on == "input":
        check_beside_x("dispatch", "routing.weights", routing.weights, x, ("top_k", config.top_k), "float")
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
            f"experts: dispatched.expert_ends is {ends.dtype} {list(ends.shape)}; expected torch.int32 [num_experts] = [{count}]"
        )
    check_weights_of_experts("experts", config, weights, dispatched.rows)


def check_combine(config: MoEConfig, rows: Tensor, dispatched: Dispatched, routing: Routing) -> Routing:
    """The routing, its ids as int64."""
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
        check_beside_x("combine", "routing.weights", routing.weights, routing.expert_ids, ("top_k", config.top_k), "float")
    sizes = {"rows": rows.shape[0], "routing.expert_ids": routing.expert_ids.shape[0] * config.top_k}
    sizes |= {f"dispatched.{name}": map_.shape[0] for name, map_ in maps.items()}
    if not torch.compiler.is_compiling() and len(set(sizes.values())) > 1:
        raise ValueError(f"combine: {', '.join(f'{name} has {size} slots' for name, size in sizes.items())}; expected as many in each")
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
