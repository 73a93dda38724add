"""Shapes, checks, panel layouts and quantization of the layer's weights."""
