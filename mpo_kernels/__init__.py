"""Linear layers and embeddings held as matrix product operators, contracted core by core."""

from mpo_kernels.backends import available_backends, use_backend
from mpo_kernels.cores.decompose import Decomposition, decompose, reconstruct, round_cores
from mpo_kernels.cores.shape import MPOShape
from mpo_kernels.layers.embedding import MPOEmbedding
from mpo_kernels.layers.experts import MPOExperts
from mpo_kernels.layers.linear import InterpolativeLinear, MPOLinear
from mpo_kernels.layers.quantized import QuantizedInterpolativeLinear, QuantizedMPOLinear
from mpo_kernels.ops.functional import mpo_embedding, mpo_linear
from mpo_kernels.planning.plan import Plan
from mpo_kernels.version import __version__

__all__ = [
    "Decomposition",
    "InterpolativeLinear",
    "MPOEmbedding",
    "MPOExperts",
    "MPOLinear",
    "MPOShape",
    "Plan",
    "QuantizedInterpolativeLinear",
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
