"""The CUDA C++ kernels of ``csrc`` for few rows, as a back end; the rest is left to the others."""
