"""Tests that the layer is one graph: with torch.compile, torch.export, AOTInductor, torch.func and CUDA graphs."""
