"""Fused kernels in Triton; importing this package needs no triton, ``backend`` does."""
