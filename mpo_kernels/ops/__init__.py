"""The operators ``mpo_kernels::linear`` and ``::embedding``, and the functions that call them."""

from mpo_kernels.ops import autograd, flops, schemas  # noqa: F401  they are registered there
