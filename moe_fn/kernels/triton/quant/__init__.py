"""Triton kernels of quantized experts."""
