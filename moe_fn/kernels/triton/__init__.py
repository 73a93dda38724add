"""Triton kernels of the stages in moe_fn.stages, with the functions that launch them."""
