"""Call signatures and outputs of each family's blocks, which a replaced block must keep."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """The signature of a family's block; the default is (hidden) -> y.

    router     name of the module whose output transformers records as router_logits
    logits_at  their index in the router's output
    stateful   whether the router passes a state from layer to layer; such a router is not replaced
    returns    the output of the block, a key of RETURNS; for a Gemma-4 layer its own forward makes the output, and only
               router and experts are replaced
    jitter     attributes of noise that the block adds to its input in training, which moe_forward does not
    """

    router: str = "gate"
    logits_at: int = 0
    stateful: bool = False
    returns: str = "y"
    jitter: tuple[str, ...] = ("jitter_noise", "input_jitter_noise", "router.moe_jitter_eps", "router.jitter_noise")


_ROUTER = Shape(router="router")
SHAPES: dict[str, Shape] = {  # by the first name of a family
    "jamba": _ROUTER,
    "afmoe": _ROUTER,
    "granitemoe": _ROUTER,
    "aria_text": _ROUTER,
    "phimoe": _ROUTER,
    "longcat_flash": _ROUTER,
    "dbrx": _ROUTER,
    "jetmoe": Shape(router="router", logits_at=4),
    "switch_transformers": Shape(router="router", logits_at=2),
    "gemma4_text": Shape(router="router", returns="the layer's own"),
    "gpt_oss": Shape(router="router", returns="y, weights"),
    "openai_privacy_filter": Shape(router="router", returns="y, weights"),
    "llama4_text": Shape(router="router", logits_at=1, returns="flat y, logits"),
    "ernie4_5_vl_moe_bank": Shape(returns="flat y, flat logits"),
    "zaya": Shape(stateful=True, returns="y, states"),
}

# (y [..., H], logits [T, L], weights [T, K], the router's state) -> the output of the block
RETURNS: dict[str, Callable[[Tensor, Tensor, Tensor, Any], Any]] = {
    "y": lambda y, logits, weights, rest: y,
    "y, weights": lambda y, logits, weights, rest: (y, weights),
    "y, states": lambda y, logits, weights, rest: (y, rest),
    "flat y, logits": lambda y, logits, weights, rest: (y.flatten(0, -2), logits),
    "flat y, flat logits": lambda y, logits, weights, rest: (y.flatten(), logits.flatten()),
}
