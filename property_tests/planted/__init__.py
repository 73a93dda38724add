"""Bugs, planted one at a time: the law or the test that each names must fail.

bugs      those of the layer, and what a planted bug is; the other files those of one part of the package
cpp       those of the C++ kernels; triton those of Triton's; ranks those that real processes must see
"""
