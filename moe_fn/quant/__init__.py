"""Quantization: weights as codes and scales, inputs of products rounded to codes.

Pure functions on tensors.
"""
