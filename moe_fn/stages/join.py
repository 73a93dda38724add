"""join: the sum of the routed and the shared experts' outputs, after the routed scale and the output transform."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_fn.config import MoEConfig
from moe_fn.numerics import accumulation_dtype


def addends(
    config: MoEConfig, routed: Tensor, shared: Tensor | None, transform: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Returns the two parts whose sum is the layer: (transform(routed * gamma), shared), halved with combine="average".

    routed [tokens, routed_size], shared [tokens, H] -> [tokens, H] twice. gamma is routed_scaling_factor if
    scale_on is the output. With scale_on="output_float16_safe", float16 and shared experts, shared is divided by gamma
    instead: the layer is then y / gamma, which does not overflow; the model compensates in its residual stream
    (DeepSeek-V2 in vLLM).

    Laws
        A scale on the output equals a scale on the weights.
        The float16 rule divides the whole layer by the scale.
        An average is half of a sum.

    >>> from moe_fn.config import RouterConfig
    >>> router = RouterConfig(routed_scaling_factor=2.5, scale_on="output")
    >>> config = MoEConfig(num_experts=1, top_k=1, hidden_size=1, intermediate_size=1, router=router)
    >>> addends(config, torch.ones(1, 1), torch.ones(1, 1), lambda routed: routed)
    (tensor([[2.5000]]), tensor([[1.]]))
    """
    gamma, scale_on = config.router.routed_scaling_factor, config.router.scale_on
    if scale_on == "output_float16_safe" and routed.dtype == torch.float16 and shared is not None:
        shared = shared / gamma
    elif scale_on != "weights" and gamma != 1.0:
        routed = routed * gamma
    routed = transform(routed)
    if shared is not None and config.shared is not None and config.shared.combine == "average":
        routed, shared = routed / 2, shared / 2
    return routed, shared


def join(routed: Tensor, shared: Tensor | None) -> Tensor:
    """Returns routed + shared, computed in float32 and rounded once.

    >>> join(torch.ones(1, 1), torch.ones(1, 1))
    tensor([[2.]])
    """
    if shared is None:
        return routed
    wide = accumulation_dtype(routed.dtype)
    return (routed.to(wide) + shared.to(wide)).to(routed.dtype)
