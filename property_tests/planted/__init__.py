"""Planted bugs: changes of the code, made one at a time, each of which a named law or test must catch.

bugs      `PlantedBug`, and the bugs of the layer
cpp       bugs of the C++ kernels; triton: of the Triton kernels; ranks: of what runs on several ranks
others    bugs of one part of the package each
"""
