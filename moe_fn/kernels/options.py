"""Which options the kernels of a back-end compute: tables from the fields of a config to the values that they know.

Each back-end has its tables in its own support.py. Options are listed, never excluded: a value or a field that a table
does not name is refused, so that a new option runs in torch's ops until a kernel has it.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Final

from moe_fn.config import MoEConfig, as_activation

ANY: Final = None  # every value: a number that the kernels read, or an option that acts outside of them
Known = Mapping[str, Collection[Any] | None]

# Fields of MoEConfig that act outside of dispatch, experts and combine, and sizes.
AROUND_EXPERTS: Known = dict.fromkeys(
    (
        "num_experts", "top_k", "hidden_size", "intermediate_size", "hidden_padding", "router", "shared", "latent",
        "zero_experts", "norms", "parallel", "chunk_tokens", "recompute", "backend", "opaque",
    )
)  # fmt: skip

# What both the C++ and the Triton kernels compute of MoEConfig and of ActivationConfig. What only one of them computes
# is a line in its own support.py.
FUSED_LAYER: Known = {
    **AROUND_EXPERTS,
    "gate_up_layout": ("packed", "interleaved"),
    "weight_layout": ("out_in", "in_out"),
    "batch_invariant": (False, True),
    "activation": ANY,  # the table of the activation
    "quant": ANY,  # the table of quantization
}
FUSED_ACTIVATION: Known = {
    "function": ("silu", "gelu", "gelu_tanh", "relu", "relu2", "situ"),
    "gated": (False, True),
    "limit": ANY,
    "limit_at": ("input", "output"),
    "alpha": ANY,
    "up_offset": ANY,
    "gate_cap": ANY,
    "up_cap": ANY,
}


def unknown_layer_option(kernels: str, config: MoEConfig, layer: Known, activation: Known) -> str | None:
    """The first option of a layer or of its activation that kernels do not know, in words; None if they know all."""
    return unknown_option(kernels, config, layer) or unknown_option(
        kernels, as_activation(config.activation), activation
    )


def unknown_option(kernels: str, config: Any, known: Known) -> str | None:
    """The first option of a config that kernels do not know, in words; None if they know all.

    A field that is not in `known` must have its default.

    >>> from moe_fn.config import RouterConfig
    >>> unknown_option("some kernels", RouterConfig(scoring="sigmoid"), {"scoring": ("softmax",)})
    "RouterConfig.scoring='sigmoid'; some kernels take 'softmax'"
    """
    for field in dataclasses.fields(config):
        value, values = getattr(config, field.name), known.get(field.name, (field.default,))
        if values is not ANY and value not in values:
            expected = " or ".join(map(repr, values))
            return f"{type(config).__name__}.{field.name}={value!r}; {kernels} take {expected}"
    return None
