"""Shapes, dtypes and devices against the config: where, what came, what was expected; from Python ints, so it costs no graph node."""

import dataclasses
import math

import torch
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.kinds import check_config, check_dtype, check_kind, check_layer, check_untraced, checked_integers
from moe_fn.quant.shapes import dtypes_of_quant
from moe_fn.records import EXPERT_PATHS, WEIGHT_PATHS, MoEWeights, Path, RouterWeights, Routing, Shape, leaves_of_weights
from moe_fn.stages._adapters import check_adapters
from moe_fn.torch_compat import check_same_size
from moe_fn.weights.prepare import is_prepared, prepared_beside_shapes, prepared_shapes
from moe_fn.weights.spec import ANY, added_by_others, expected_shapes

_COMPUTE_DTYPE = {("gate_up",), ("down",), ("shared", "gate_up"), ("shared", "down"), ("latent", "input"), ("latent", "output")}
_COMPUTE_DTYPE |= {("lora", name) for name in ("gate_up_a", "gate_up_b", "down_a", "down_b")}
_INTEGERS = {("router", name) for name in ("expert_ids_of_token", "logical_of_physical", "physical_of_logical", "num_replicas")}
MOST_SLOTS = 2**31 - 1  # rows of experts are counted in int32
_PREPARED = (("gate_up",), ("down",))  # what prepare_weights lays
_OF_EXPERTS = set(EXPERT_PATHS)
_OF_ADAPTERS = {path for path in WEIGHT_PATHS if path[0] == "lora"}


def check_weights(where: str, config: MoEConfig, weights: MoEWeights, x: Tensor, any_dtype: bool = False) -> None:
    """Every weight has the shape that the config gives it, a float dtype (unless any_dtype that of x for matrices) and the device of x."""
    check_layer(where, config, weights)
    _check_leaves(where, config, weights, set(WEIGHT_PATHS), x, "x", any_dtype)
    if weights.router is not None and weights.router.bias is not None and weights.router.gate is None:
        raise ValueError(f"{where}: weights.router.bias without weights.router.gate would have no effect; expected both or none")


def check_shapes(where: str, config: MoEConfig, weights: MoEWeights) -> None:
    """Every weight that is there has the shape that the config gives it; what else must be there is known when the layer is called."""
    check_layer(where, config, weights)
    _check_added_once(where, config, weights)
    shapes, quantised = expected_shapes(config), dtypes_of_quant(config)
    for path, leaf in zip(WEIGHT_PATHS, leaves_of_weights(weights), strict=True):
        if leaf is not None:
            _check_weight(where, "weights." + ".".join(path), path, leaf, shapes.get(path), leaf.device, quantised.get(path))


def check_weights_of_experts(where: str, config: MoEConfig, weights: MoEWeights, rows: Tensor) -> None:
    """What `experts` reads, plain or prepared: shapes by the config, dtype and device of its rows."""
    _check_leaves(where, config, weights, _OF_EXPERTS if config.lora is None else _OF_EXPERTS | _OF_ADAPTERS, rows, "the rows", False)


def _check_leaves(where: str, config: MoEConfig, weights: MoEWeights, paths: set[Path], like: Tensor, named: str, any_dtype: bool) -> None:
    _check_added_once(where, config, weights)
    shapes, quantised = expected_shapes(config), dtypes_of_quant(config)
    if is_prepared(weights.gate_up):
        laid = prepared_beside_shapes(config.own)
        shapes |= {path: (laid[path], True) for path in shapes if path in laid}
    for path, leaf in zip(WEIGHT_PATHS, leaves_of_weights(weights), strict=True):
        if path not in paths or (leaf is None and path not in shapes):
            continue
        prepared = leaf is not None and path in _PREPARED and is_prepared(leaf)
        dtype = leaf.dtype if leaf is not None and any_dtype else like.dtype
        expected = shapes.get(path) if not prepared else _prepared_shape(config, path, dtype)
        _check_weight(where, "weights." + ".".join(path), path, leaf, expected, like.device, quantised.get(path))
        if leaf is not None and path in _COMPUTE_DTYPE and not (config.quant and path in _PREPARED) and leaf.dtype != dtype:
            raise ValueError(f"{where}: weights.{'.'.join(path)} is {leaf.dtype}; expected the dtype of {named}, {like.dtype}")
    if is_prepared(weights.gate_up) != is_prepared(weights.down):
        raise ValueError(f"{where}: one of weights.gate_up and weights.down is prepared; expected both or none")
    check_adapters(where, config, weights.lora)


def _check_added_once(where: str, config: MoEConfig, weights: MoEWeights) -> None:
    """Of ranks with slices of the same experts one has their bias: their outputs are summed."""
    for path in added_by_others(config):
        part = weights if len(path) == 1 else getattr(weights, path[0])
        if getattr(part, path[-1], None) is not None:
            raise ValueError(
                f"{where}: weights.{'.'.join(path)} is on a rank with another slice than the first; expected None, for the slices' outputs "
                "are summed, and the first slice adds it (shard_weights and load_moe_weights leave it out)"
            )


def _prepared_shape(config: MoEConfig, path: Path, dtype: torch.dtype) -> tuple[Shape, bool]:
    shape = prepared_shapes(config.own, dtype)[_PREPARED.index(path)]
    return tuple(zip(("num_experts", "panels", "steps", "columns of a step"), shape, strict=True)), True


def _check_weight(
    where: str,
    name: str,
    path: Path,
    leaf: Tensor | None,
    expected: tuple[Shape, bool] | None,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> None:
    if leaf is None:
        if expected is not None and expected[1]:
            raise ValueError(f"{where}: {name} is None; expected {_words(expected[0])}, for the config asks for it")
        return
    if expected is None:
        raise ValueError(f"{where}: {name} is {_sizes(leaf)}; expected None, for the config has no use for it")
    shape, _ = expected
    if leaf.ndim != len(shape) or any(size != ANY and actual != size for actual, (_, size) in zip(leaf.shape, shape, strict=True)):
        raise ValueError(f"{where}: {name} is {_sizes(leaf)}; expected {_words(shape)}")
    if dtypes is None:
        check_dtype(where, name, leaf, "integer" if path in _INTEGERS else "float")
    elif leaf.dtype not in dtypes:
        raise ValueError(f"{where}: {name} is {leaf.dtype}; expected {' or '.join(map(str, dtypes))}, for config.quant")
    if leaf.device != device:
        raise ValueError(f"{where}: {name} is on {leaf.device}; expected the device of x, {device}")


def _words(shape: Shape) -> str:
    names, sizes = ", ".join(name for name, _ in shape), ", ".join("any" if size == ANY else str(size) for _, size in shape)
    return f"({names}) = ({sizes})"


def check_x(where: str, config: MoEConfig, x: Tensor) -> None:
    check_config(where, config)
    check_kind(where, "x", x, Tensor)
    if x.ndim < 2 or x.shape[-1] != config.hidden_size:
        raise ValueError(
            f"{where}: x is {_sizes(x)}; expected (..., hidden_size) with hidden_size={config.hidden_size} and at least 2 dims"
        )
    if not x.dtype.is_floating_point:
        raise ValueError(f"{where}: x is {x.dtype}; expected a floating-point dtype")
    check_slots(where, math.prod(x.shape[:-1]), config.top_k)


def check_slots(where: str, tokens: int, top_k: int) -> None:
    if not torch.compiler.is_compiling() and isinstance(tokens, int) and tokens * top_k > MOST_SLOTS:  # in a graph it would be a guard
        raise ValueError(f"{where}: x has {tokens} tokens, {tokens * top_k} slots with top_k={top_k}; expected at most {MOST_SLOTS}")


def check_beside_x(where: str, name: str, value: Tensor, x: Tensor, last: tuple[str, int] | None, kind: str) -> None:
    """A tensor with one entry (or one row of `last` entries) for each token of x."""
    check_kind(where, name, value, Tensor)
    leading = x.ndim - 1
    if value.ndim != leading + (last is not None) or (last is not None and value.shape[-1] != last[1]):
        wanted = f"(..., {last[0]}) with {last[0]}={last[1]}" if last else "(...)"
        raise ValueError(f"{where}: {name} is {_sizes(value)}; expected {wanted} and the leading dims of x, {_sizes(x)}")
    for dim in range(leading):
        if torch.compiler.is_compiling():
            words = f"{where}: {name} and x differ in their number of tokens; expected the leading dims of x"  # Dynamo writes no sizes
            check_same_size(value.shape[dim], x.shape[dim], words)
        elif value.shape[dim] != x.shape[dim]:
            raise ValueError(f"{where}: {name} is {_sizes(value)}; expected the leading dims of x, {_sizes(x)}")
    check_dtype(where, name, value, kind)
    if value.device != x.device:
        raise ValueError(f"{where}: {name} is on {value.device}; expected the device of x, {x.device}")


def checked_ids(where: str, name: str, value: Tensor, x: Tensor, last: tuple[str, int] | None) -> Tensor:
    """check_beside_x of integers, and these as int64."""
    check_beside_x(where, name, value, x, last, "integer")
    return checked_integers(where, name, value)


def _sizes(t: Tensor) -> str:
    return "(" + ", ".join(str(size) for size in t.shape) + ")"


def check_routing_inputs(
    config: MoEConfig, router: RouterWeights, logits: Tensor, token_ids: Tensor | None, token_mask: Tensor | None
) -> Tensor | None:
    """What `route` reads, checked where route is called alone; token_ids as int64."""
    check_kind("route", "logits", logits, Tensor)
    check_untraced("route", logits.ndim and logits.shape[0])
    if logits.ndim != 2 or logits.shape[-1] != config.num_logits:
        raise ValueError(f"route: logits is {_sizes(logits)}; expected (tokens, num_logits) with num_logits={config.num_logits}")
    check_dtype("route", "logits", logits, "float")
    token_ids = check_token_inputs("route", config, logits, token_ids, token_mask)
    _check_router("route", config, router, logits)
    return token_ids


def _check_router(where: str, config: MoEConfig, router: RouterWeights, logits: Tensor) -> None:
    shapes = expected_shapes(config)
    for name in ("correction_bias", "expert_scale", "expert_ids_of_token"):
        path = ("router", name)
        _check_weight(where, f"weights.router.{name}", path, getattr(router, name), shapes.get(path), logits.device)


def check_choice_inputs(
    where: str, config: MoEConfig, router: RouterWeights, logits: Tensor, expert_ids: Tensor, token_mask: Tensor | None
) -> Tensor:
    """What `route_to` reads, and that the ids say what the weights are; the ids as int64."""
    check_config(where, config)
    check_kind(where, "logits", logits, Tensor)
    if logits.ndim < 2 or logits.shape[-1] != config.num_logits:
        raise ValueError(f"{where}: logits is {_sizes(logits)}; expected (..., num_logits) with num_logits={config.num_logits}")
    check_dtype(where, "logits", logits, "float")
    expert_ids = checked_ids(where, "expert_ids", expert_ids, logits, ("top_k", config.top_k))
    if token_mask is not None:
        check_beside_x(where, "token_mask", token_mask, logits, None, "bool")
    _check_router(where, config, router, logits)
    if config.router.selection == "sparsemixer":
        raise ValueError(f"{where}: selection='sparsemixer' weighs by softmaxes around its own choice; expected 'top_k' or 'hash'")
    if config.router.capacity is not None and config.router.renormalize:
        raise ValueError(
            f"{where}: capacity={config.router.capacity} with renormalize=True: slots dropped from the ids are part of the norm; "
            "expected capacity=None or renormalize=False"
        )
    return expert_ids


def check_token_inputs(where: str, config: MoEConfig, x: Tensor, token_ids: Tensor | None, token_mask: Tensor | None) -> Tensor | None:
    """Ids of tokens where hash routing reads them, as int64, and a mask of bools."""
    hashed = config.router.selection == "hash"
    if hashed and token_ids is None:
        raise ValueError(f"{where}: token_ids is None; expected integer ids, for router.selection='hash'")
    if token_ids is not None:
        if not hashed:
            raise ValueError(f"{where}: token_ids would have no effect; expected None, or router.selection='hash'")
        token_ids = checked_ids(where, "token_ids", token_ids, x, None)
    if token_mask is not None:
        check_beside_x(where, "token_mask", token_mask, x, None, "bool")
    return token_ids


def check_adapter_ids(where: str, config: MoEConfig, x: Tensor, adapter_ids: Tensor | None) -> Tensor | None:
    """Ids of adapters where there are adapters to choose among, as int64. Values are not looked at: one that there is not is none."""
    if adapter_ids is not None:
        if config.lora is None:
            raise ValueError(f"{where}: adapter_ids would have no effect; expected None, or MoEConfig.lora")
        return checked_ids(where, "adapter_ids", adapter_ids, x, None)
    if config.lora is not None and config.lora.num_adapters > 1:
        raise ValueError(
            f"{where}: adapter_ids is None; expected an id of the {config.lora.num_adapters} adapters for each token, -1 for none"
        )
    return None


def check_routing(where: str, config: MoEConfig, x: Tensor, routing: Routing) -> Routing:
    """A Routing, ours or the caller's own, that fits the config and x; its expert_ids as int64."""
    check_kind(where, "routing", routing, Routing)
    top_k = ("top_k", config.top_k)
    ids = checked_ids(where, "routing.expert_ids", routing.expert_ids, x, top_k)
    check_beside_x(where, "routing.weights", routing.weights, x, top_k, "float")
    weighed = config.shared is not None and config.shared.gate == "router"
    if weighed != (routing.shared_weights is not None):
        raise ValueError(f"{where}: routing.shared_weights is {'None' if weighed else 'given'}; expected the opposite for this config")
    if routing.shared_weights is not None and config.shared is not None:
        count = ("shared.count", config.shared.count)
        check_beside_x(where, "routing.shared_weights", routing.shared_weights, x, count, "float")
    return with_ids(routing, ids)


def with_ids(routing: Routing, expert_ids: Tensor) -> Routing:
    """The routing, with these ids; itself where they are its own."""
    return routing if expert_ids is routing.expert_ids else dataclasses.replace(routing, expert_ids=expert_ids)
