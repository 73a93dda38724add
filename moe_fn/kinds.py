"""Of what type arguments are: said in words before anything reads them. Shapes and dtypes: `moe_fn.checking`."""

from typing import Any

from torch import Tensor
from torch.fx import Proxy

from moe_fn.config import MoEConfig
from moe_fn.records import NESTED_WEIGHTS, WEIGHT_PATHS, MoEWeights, leaves_of_weights


def check_kind(where: str, name: str, value: Any, kind: type) -> None:
    """ValueError where the value is not of the type."""
    if isinstance(value, kind):
        return
    expected = f"{'a ' if kind is Tensor else ''}{kind.__name__}"
    if isinstance(value, Proxy):
        expected += f", or torch.fx.wrap({where!r}) beside its import: torch.fx.symbolic_trace then takes the call as one node"
    raise ValueError(f"{where}: {name} is a {type(value).__name__}; expected {expected}")


def check_untraced(where: str, size: Any) -> None:
    """ValueError below torch.jit.trace, whose sizes are tensors: what is computed of them here would stay as it was for the example."""
    if isinstance(size, Tensor):
        raise ValueError(
            f"{where}: torch.jit.trace takes the sizes of its example for all; expected torch.export.export, torch.compile, or "
            "moe_forward with MoEConfig(opaque=True), which is one op"
        )


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
        if leaf is not None and not isinstance(leaf, Tensor):
            check_kind(where, f"weights.{'.'.join(path)}", leaf, Tensor)
