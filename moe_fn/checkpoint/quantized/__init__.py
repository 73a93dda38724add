"""Published formats of quantized experts, and their conversion to `QuantWeights`."""
