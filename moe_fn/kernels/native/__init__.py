"""The C++ kernels for CPUs: compiled on first use, checked before they are loaded."""
