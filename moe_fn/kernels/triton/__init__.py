"""Triton kernels: what they compute is said by moe_fn.stages; how they are launched, by the functions beside them."""
