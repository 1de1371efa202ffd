"""MPOEmbedding: ``nn.Embedding`` whose table is a matrix product operator, and its tied head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpo_kernels.cores.decompose import Decomposition, decompose, reconstruct
from mpo_kernels.cores.shape import MPOShape
from mpo_kernels.layers.linear import MPOLinear
from mpo_kernels.layers.module import MPOModule
from mpo_kernels.ops.functional import embedding as lookup


class MPOEmbedding(MPOModule):
    """Drop-in for ``nn.Embedding``: ids ``[...] -> [..., embedding_dim]``.

    Only the rows asked for are formed, each distinct one once; a vocabulary that does not factor
    is padded, and the padding is never touched.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: length of a row.
        shape: factors and bonds, in = ``num_embeddings``, out = ``embedding_dim``.
        padding_idx: an id whose occurrences pass no gradient on.
        device, dtype: of the parameters.

    Raises:
        ValueError: a shape for other sizes, or a padding_idx outside the table.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        shape: MPOShape,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(shape, device, dtype)
        if (shape.in_features, shape.out_features) != (num_embeddings, embedding_dim):
            raise ValueError(
                f"expected a shape for {num_embeddings} × {embedding_dim}, "
                f"got one for {shape.in_features} × {shape.out_features}"
            )
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"expected padding_idx within {num_embeddings} rows, got {padding_idx}"
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Entries of the table with variance 1, as ``nn.Embedding`` starts."""
        self._reset_cores(1.0)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        shape: MPOShape | None = None,
        *,
        max_rank: int | None = None,
        rel_error: float | None = None,
        compression: float | None = None,
    ) -> MPOEmbedding:
        """Decompose a dense table; exact unless a bound or ``shape.ranks`` cuts.

        Args:
            embedding: not changed.
            shape: factors and caps on the bonds; by default five balanced factors at full rank.
            max_rank, rel_error, compression: see :func:`mpo_kernels.decompose`.

        Raises:
            ValueError: a table with ``max_norm``, ``scale_grad_by_freq`` or ``sparse``, which need
                its rows as parameters.
        """
        if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
            raise ValueError(
                "expected an embedding without max_norm, scale_grad_by_freq and sparse, "
                f"got {embedding}"
            )
        shape = shape or MPOShape.balanced(embedding.num_embeddings, embedding.embedding_dim)
        decomposition = decompose(
            embedding.weight.t(),
            shape,
            max_rank=max_rank,
            rel_error=rel_error,
            compression=compression,
        )
        return cls.from_decomposition(decomposition, embedding.padding_idx)

    @classmethod
    def from_decomposition(
        cls, decomposition: Decomposition, padding_idx: int | None = None
    ) -> MPOEmbedding:
        """A layer with the cores of a decomposition of the table's transpose ``[dim, rows]``."""
        shape = decomposition.shape
        layer = cls(shape.in_features, shape.out_features, shape, padding_idx, device="meta")
        layer.cores = nn.ParameterList(
            nn.Parameter(core.contiguous()) for core in decomposition.cores
        )
        return layer

    @property
    def weight(self) -> Tensor:
        """Size and dtype of the table, on the meta device; see :attr:`MPOLinear.weight`."""
        size = (self.num_embeddings, self.embedding_dim)
        return torch.empty(size, dtype=self.cores[0].dtype, device="meta")

    def forward(self, ids: Tensor) -> Tensor:
        """``ids [...] -> [..., embedding_dim]``."""
        return lookup(
            ids, list(self.cores), self.padding_idx, self.num_embeddings, self.embedding_dim
        )

    @torch.no_grad()
    def to_embedding(self) -> nn.Embedding:
        """The dense table."""
        table = reconstruct(
            [core.transpose(1, 2) for core in self.cores],
            in_features=self.embedding_dim,
            out_features=self.num_embeddings,
        )
        return nn.Embedding.from_pretrained(table, freeze=False, padding_idx=self.padding_idx)

    def as_linear(self, bias: Tensor | None = None) -> MPOTiedLinear:
        """The tied output head, ``[..., embedding_dim] -> [..., num_embeddings]``.

        It holds the very same core parameters; ``bias [num_embeddings]`` is taken as it is.
        """
        return MPOTiedLinear(self, bias)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, in_factors={self.shape.in_factors}, "
            f"out_factors={self.shape.out_factors}, ranks={self.shape.ranks}, "
            f"padding_idx={self.padding_idx}"
        )


class MPOTiedLinear(MPOLinear):
    """The transpose of an embedding's table as an output layer, over the embedding's own cores.

    ``shape`` is that of the cores, in = ``num_embeddings``, as the embedding has it, and follows
    the embedding when that is rounded or loaded.
    """

    def __init__(self, embedding: MPOEmbedding, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self._factors, self.cores = embedding._factors, embedding.cores
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"expected a bias [{self.out_features}], got {list(bias.shape)}")
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)

    def oriented_cores(self) -> list[Tensor]:
        return [core.transpose(1, 2) for core in self.cores]
