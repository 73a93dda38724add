"""The Triton kernels of quantized experts."""
