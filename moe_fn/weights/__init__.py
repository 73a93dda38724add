"""Shapes, checks and layouts of the layer's weights."""
