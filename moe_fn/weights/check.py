"""Checks of weights against the config: types, shapes, dtypes and devices."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_fn.checks import check_dtype, check_kind, sizes_of
from moe_fn.config import MoEConfig
from moe_fn.records import NESTED_WEIGHTS, WEIGHT_PATHS, LoRAWeights, MoEWeights, Path, Shape, leaves_of_weights
from moe_fn.torch_compat import constant_while_tracing
from moe_fn.weights.axes import ANY
from moe_fn.weights.shapes import MATRICES, Expected, expected_prepared, expected_weights, is_prepared
from moe_fn.weights.spec import EXPERT_DIMS, EXPERT_PATHS

Leaves = list[Tensor | None]  # the tensors of MoEWeights in the order of WEIGHT_PATHS


def check_config(where: str, config: Any) -> None:
    """Raises ValueError unless the config is a MoEConfig."""
    check_kind(where, "config", config, MoEConfig)


def check_layer(where: str, config: Any, weights: Any) -> Leaves:
    """Checks the types of config, weights and tensors; returns the tensors in the order of WEIGHT_PATHS."""
    check_config(where, config)
    check_kind(where, "weights", weights, MoEWeights)
    for name in _nested():
        if getattr(weights, name) is not None:
            check_kind(where, f"weights.{name}", getattr(weights, name), NESTED_WEIGHTS[name])
    for name in ("gate_up", "down"):
        check_kind(where, f"weights.{name}", getattr(weights, name), Tensor)
    leaves = leaves_of_weights(weights)
    for place, leaf in enumerate(leaves):
        if leaf is not None and type(leaf) is not Tensor and type(leaf) is not nn.Parameter:
            check_kind(where, f"weights.{'.'.join(WEIGHT_PATHS[place])}", leaf, Tensor)
    return leaves


@constant_while_tracing
def _nested() -> tuple[str, ...]:
    return tuple(NESTED_WEIGHTS)


def check_weights(where: str, config: MoEConfig, weights: MoEWeights, x: Tensor, any_dtype: bool = False) -> None:
    """Checks every weight: the shape by the config, a float dtype (of matrices the dtype of x, unless any_dtype), the
    device of x.
    """
    leaves = check_layer(where, config, weights)
    _check_leaves(where, config, weights, leaves, x, "x", any_dtype)
    if weights.router is not None and weights.router.bias is not None and weights.router.gate is None:
        raise ValueError(
            f"{where}: weights.router.bias without weights.router.gate would have no effect; expected both or none"
        )


def check_shapes(where: str, config: MoEConfig, weights: MoEWeights) -> None:
    """Checks the shapes of the weights that are given. Missing weights raise when the layer is called."""
    leaves = check_layer(where, config, weights)
    _check_added_once(where, config, leaves)
    for expected, leaf in zip(expected_weights(config), leaves, strict=True):
        if leaf is not None:
            check_weight(where, expected, leaf, leaf.device)


def check_weights_of_experts(where: str, config: MoEConfig, weights: MoEWeights, rows: Tensor) -> None:
    """Checks the weights that `experts` reads, plain or prepared: shapes, and the dtype and device of the rows."""
    paths = EXPERT_PATHS if config.lora is None else tuple(EXPERT_DIMS)
    _check_leaves(where, config, weights, leaves_of_weights(weights), rows, "the rows", False, paths)


def _check_leaves(
    where: str,
    config: MoEConfig,
    weights: MoEWeights,
    leaves: Leaves,
    like: Tensor,
    named: str,
    any_dtype: bool,
    paths: tuple[Path, ...] | None = None,
) -> None:
    """Checks the weights of these paths (None: all) against the dtype and device of the tensor `like`.

    leaves: all tensors of the weights, in the order of WEIGHT_PATHS.
    """
    _check_added_once(where, config, leaves)
    for expected, leaf in zip(expected_weights(config, is_prepared(weights.gate_up)), leaves, strict=True):
        if (leaf is None and not expected.required) or (paths is not None and expected.path not in paths):
            continue
        dtype = leaf.dtype if leaf is not None and any_dtype else like.dtype
        if leaf is not None and expected.path in MATRICES and is_prepared(leaf):
            expected = expected_prepared(config, dtype)[MATRICES.index(expected.path)]
        check_weight(where, expected, leaf, like.device)
        if leaf is not None and expected.kind == "compute" and leaf.dtype != dtype:
            raise ValueError(f"{where}: {expected.name} is {leaf.dtype}; expected the dtype of {named}, {like.dtype}")
    if is_prepared(weights.gate_up) != is_prepared(weights.down):
        raise ValueError(f"{where}: one of weights.gate_up and weights.down is prepared; expected both or none")
    check_adapters(where, config, weights.lora)


def _check_added_once(where: str, config: MoEConfig, leaves: Leaves) -> None:
    """Raises ValueError for a bias on a rank that must not add it: outputs of slices are summed over ranks, so only the
    first slice adds biases.
    """
    if config.parallel is None:
        return
    for expected, leaf in zip(expected_weights(config), leaves, strict=True):
        if expected.added_by_others and leaf is not None:
            raise ValueError(
                f"{where}: {expected.name} is on a rank whose slice is not the first; expected None, because outputs "
                "of slices are summed and the first slice adds it (shard_weights and load_moe_weights leave it out)"
            )


def check_weight(where: str, expected: Expected, leaf: Tensor | None, device: torch.device) -> None:
    """Checks one weight: presence, shape, dtype and device."""
    name, shape = expected.name, expected.shape
    if leaf is None:
        if expected.required and shape is not None:
            raise ValueError(f"{where}: {name} is None; expected {_format_shape(shape)}, which the config requires")
        return
    if shape is None:
        raise ValueError(f"{where}: {name} is {sizes_of(leaf)}; expected None, because the config does not use it")
    if leaf.shape != expected.sizes and not _fits(leaf, shape):
        raise ValueError(f"{where}: {name} is {sizes_of(leaf)}; expected {_format_shape(shape)}")
    if expected.dtypes is None:
        check_dtype(where, name, leaf, "integer" if expected.kind == "integer" else "float")
    elif leaf.dtype not in expected.dtypes:
        raise ValueError(
            f"{where}: {name} is {leaf.dtype}; expected {' or '.join(map(str, expected.dtypes))} with config.quant"
        )
    if leaf.device != device:
        raise ValueError(f"{where}: {name} is on {leaf.device}; expected the device of x, {device}")


def _fits(leaf: Tensor, shape: Shape) -> bool:
    return leaf.ndim == len(shape) and all(
        size in (ANY, actual) for actual, (_, size) in zip(leaf.shape, shape, strict=True)
    )


def _format_shape(shape: Shape) -> str:
    names, sizes = (
        ", ".join(name for name, _ in shape),
        ", ".join("any" if size == ANY else str(size) for _, size in shape),
    )
    return f"({names}) = ({sizes})"


def check_adapters(where: str, config: MoEConfig, lora: LoRAWeights | None) -> None:
    """Checks that adapters have both matrices of a product or neither, and at least one product."""
    if config.lora is None:
        return
    if lora is None:
        raise ValueError(f"{where}: weights.lora is None; expected LoRAWeights, because config.lora is given")
    products = {"gate_up": (lora.gate_up_a, lora.gate_up_b), "down": (lora.down_a, lora.down_b)}
    for name, (a, b) in products.items():
        if (a is None) != (b is None):
            raise ValueError(
                f"{where}: one of weights.lora.{name}_a and weights.lora.{name}_b is None; expected both or none"
            )
    if all(a is None for a, _ in products.values()):
        raise ValueError(
            f"{where}: weights.lora has no tensors; expected those of gate_up or of down, because config.lora is given"
        )
