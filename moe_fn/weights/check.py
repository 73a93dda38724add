"""Whether weights fit the config: their types, shapes, dtypes and devices."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_fn.checks import check_dtype, check_kind, sizes_of
from moe_fn.config import MoEConfig
from moe_fn.quant.shapes import dtypes_of_quant
from moe_fn.records import EXPERT_PATHS, NESTED_WEIGHTS, WEIGHT_PATHS, LoRAWeights, MoEWeights, Path, Shape, leaves_of_weights
from moe_fn.weights.spec import ANY, added_by_others, expected_shapes, is_prepared, prepared_beside_shapes, prepared_shapes


def check_config(where: str, config: Any) -> None:
    """ValueError for anything but a MoEConfig."""
    check_kind(where, "config", config, MoEConfig)


def check_layer(where: str, config: Any, weights: Any) -> None:
    """ValueError for anything but a MoEConfig and MoEWeights that hold tensors."""
    check_config(where, config)
    check_kind(where, "weights", weights, MoEWeights)
    for name, kind in NESTED_WEIGHTS.items():
        if getattr(weights, name) is not None:
            check_kind(where, f"weights.{name}", getattr(weights, name), kind)
    for name in ("gate_up", "down"):
        check_kind(where, f"weights.{name}", getattr(weights, name), Tensor)
    for path, leaf in zip(WEIGHT_PATHS, leaves_of_weights(weights), strict=True):
        if leaf is not None and type(leaf) is not Tensor and type(leaf) is not nn.Parameter:
            check_kind(where, f"weights.{'.'.join(path)}", leaf, Tensor)


_COMPUTE_DTYPE = {("gate_up",), ("down",), ("shared", "gate_up"), ("shared", "down"), ("latent", "input"), ("latent", "output")}
_COMPUTE_DTYPE |= {("lora", name) for name in ("gate_up_a", "gate_up_b", "down_a", "down_b")}
_INTEGERS = {("router", name) for name in ("expert_ids_of_token", "logical_of_physical", "physical_of_logical", "num_replicas")}
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
            check_weight(where, "weights." + ".".join(path), path, leaf, shapes.get(path), leaf.device, quantised.get(path))


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
        check_weight(where, "weights." + ".".join(path), path, leaf, expected, like.device, quantised.get(path))
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


def check_weight(
    where: str,
    name: str,
    path: Path,
    leaf: Tensor | None,
    expected: tuple[Shape, bool] | None,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> None:
    """One weight against its shape, whether it must be there, its kind of dtype and the device."""
    if leaf is None:
        if expected is not None and expected[1]:
            raise ValueError(f"{where}: {name} is None; expected {_words(expected[0])}, for the config asks for it")
        return
    if expected is None:
        raise ValueError(f"{where}: {name} is {sizes_of(leaf)}; expected None, for the config has no use for it")
    shape, _ = expected
    if leaf.ndim != len(shape) or any(size != ANY and actual != size for actual, (_, size) in zip(leaf.shape, shape, strict=True)):
        raise ValueError(f"{where}: {name} is {sizes_of(leaf)}; expected {_words(shape)}")
    if dtypes is None:
        check_dtype(where, name, leaf, "integer" if path in _INTEGERS else "float")
    elif leaf.dtype not in dtypes:
        raise ValueError(f"{where}: {name} is {leaf.dtype}; expected {' or '.join(map(str, dtypes))}, for config.quant")
    if leaf.device != device:
        raise ValueError(f"{where}: {name} is on {leaf.device}; expected the device of x, {device}")


def _words(shape: Shape) -> str:
    names, sizes = ", ".join(name for name, _ in shape), ", ".join("any" if size == ANY else str(size) for _, size in shape)
    return f"({names}) = ({sizes})"


def check_adapters(where: str, config: MoEConfig, lora: LoRAWeights | None) -> None:
    """Both matrices of a product or none, and one product at least; ValueError in words."""
    if config.lora is None:
        return
    if lora is None:
        raise ValueError(f"{where}: weights.lora is None; expected LoRAWeights, for the config asks for them")
    products = {"gate_up": (lora.gate_up_a, lora.gate_up_b), "down": (lora.down_a, lora.down_b)}
    for name, (a, b) in products.items():
        if (a is None) != (b is None):
            raise ValueError(f"{where}: one of weights.lora.{name}_a and weights.lora.{name}_b is None; expected both or none")
    if all(a is None for a, _ in products.values()):
        raise ValueError(f"{where}: weights.lora has no tensors; expected those of gate_up or of down, for the config asks for them")
