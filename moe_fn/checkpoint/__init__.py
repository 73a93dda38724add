"""Loads published safetensors checkpoints into `MoEWeights`, and saves them.

Names and axes of tensors are data in the rows of `moe_fn.families`, and the formats of quantized ones are rows of a
table (`moe_fn.checkpoint.quantized.formats`). Needs `pip install moe_fn[checkpoint]`.
"""

from moe_fn.checkpoint.layers import MoELayer, load_moe_layer, load_moe_layers, moe_layers
from moe_fn.checkpoint.layout import LAYOUTS, Layout
from moe_fn.checkpoint.loading import load_moe_weights
from moe_fn.checkpoint.peft import load_lora
from moe_fn.checkpoint.saving import save_moe_weights
from moe_fn.families.tensor_names import Entry

__all__ = [
    "LAYOUTS", "Entry", "Layout", "MoELayer", "load_lora", "load_moe_layer", "load_moe_layers", "load_moe_weights",
    "moe_layers",
    "save_moe_weights",
]  # fmt: skip
