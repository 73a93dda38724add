"""Ahead-of-time compilation of the Triton kernels for GPUs, without a GPU, and the resources that they use."""
