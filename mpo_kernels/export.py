"""The operators in plain torch, for exported programs that run without this package.

``program.run_decompositions(DECOMPOSITIONS)`` takes them out of what ``torch.export.export`` gives.
A program has one contraction of a layer for every number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import mpo_kernels.ops  # noqa: F401  the operators are defined there
from mpo_kernels.backends.torch import gather
from mpo_kernels.backends.torch.backend import ALGORITHMS, TorchBackend

# The rows that it is planned for: a batch of texts.
ROWS = 512


def _linear(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    plan = TorchBackend().plan_for(ROWS, x.dtype, x.device, cores)
    rows = x.reshape(-1, x.shape[-1])
    y = ALGORITHMS[plan.algorithm].plain(rows, cores, out_features, plan)
    if bias is not None:
        y = y + bias
    return y.reshape(*x.shape[:-1], out_features)


def _embedding(
    ids: Tensor, cores: Sequence[Tensor], num_embeddings: int, embedding_dim: int
) -> Tensor:
    # A view of the ids, contiguous as they are here, would refuse others.
    flat = ids.clone(memory_format=torch.contiguous_format).view(-1)
    # Zeros that are looked up: what runs the program refuses ids outside, as for a dense table.
    zeros = torch.zeros(num_embeddings, 1, dtype=torch.int8, device=ids.device)
    flat = flat + nn.functional.embedding(flat, zeros).view(-1)
    return gather.plain(flat, cores, embedding_dim).reshape(*ids.shape, embedding_dim)


DECOMPOSITIONS = {
    torch.ops.mpo_kernels.linear.default: _linear,
    torch.ops.mpo_kernels.embedding.default: _embedding,
}
