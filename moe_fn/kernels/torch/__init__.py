"""Grouped products in torch's own ops."""
