"""The operators ``mpo_kernels::linear`` and ``::embedding``, and the functions that call them."""

from mpo_kernels.ops import autograd, schemas  # noqa: F401  defines them, and their gradients
