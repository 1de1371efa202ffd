"""Linear layers and embeddings held as matrix product operators, contracted core by core."""

import mpo_kernels.autograd  # noqa: F401  registers the gradients of the operators
from mpo_kernels.backends import available_backends, use_backend
from mpo_kernels.decompose import Decomposition, decompose, reconstruct, round_cores
from mpo_kernels.embedding import MPOEmbedding
from mpo_kernels.linear import MPOLinear
from mpo_kernels.ops import mpo_embedding, mpo_linear
from mpo_kernels.plan import Plan
from mpo_kernels.quantized import QuantizedMPOLinear
from mpo_kernels.shape import MPOShape
from mpo_kernels.version import __version__

__all__ = [
    "Decomposition",
    "MPOEmbedding",
    "MPOLinear",
    "MPOShape",
    "Plan",
    "QuantizedMPOLinear",
    "__version__",
    "available_backends",
    "decompose",
    "mpo_embedding",
    "mpo_linear",
    "reconstruct",
    "round_cores",
    "use_backend",
]
