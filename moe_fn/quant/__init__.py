"""Numbers in few bits: weights as codes and scales, inputs rounded to what a product takes. Pure functions on tensors."""

from moe_fn.quant.codes import dequantize_weights, quantize_weights

__all__ = ["dequantize_weights", "quantize_weights"]
