"""Torch ops with gradients, fakes and batching rules. Each file says why it is an op and what makes it obsolete."""
