"""Numbers in few bits: weights as codes and scales, inputs rounded to what a product takes.

Pure functions on tensors.
"""
