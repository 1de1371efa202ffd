"""MPOExperts: one linear map of each expert, as chains of one shape stacked over the experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpo_kernels.cores.decompose import Decomposition
from mpo_kernels.cores.gauge import balanced
from mpo_kernels.cores.shape import MPOShape
from mpo_kernels.cores.stack import reconstruct_stack
from mpo_kernels.layers.module import MPOModule
from mpo_kernels.ops.functional import check_input
from mpo_kernels.ops.grouped import grouped_linear


class MPOExperts(MPOModule):
    """Maps rows sorted by expert, ``[rows, in_features] -> [rows, out_features]``, each by its own.

    Equivalent to ``F.linear(x_e, reconstruct(cores_e))`` for each expert e, computed from the
    cores by :func:`mpo_kernels.ops.grouped.grouped_linear`. A bias is the caller's to add.

    Attributes:
        cores: ParameterList; core k is ``[E, D_k, i_k, j_k, D_{k+1}]``, a shared one without E.

    Args:
        num_experts: E, at least 1.
        shape: factors and bonds of each expert's matrix.
        shared: index of a core that all experts have in common: Gao et al., "Parameter-Efficient
            Mixture-of-Experts Architecture for Pre-trained Language Models", COLING 2022.
        device, dtype: of the parameters.

    Raises:
        ValueError: no expert, or no such core.
    """

    def __init__(
        self,
        num_experts: int,
        shape: MPOShape,
        shared: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(shape, device, dtype)
        if num_experts < 1:
            raise ValueError(f"expected at least one expert, got {num_experts}")
        if shared is not None and not 0 <= shared < shape.num_cores:
            raise ValueError(f"shared: expected one of {shape.num_cores} cores, got {shared}")
        self.num_experts, self.shared = num_experts, shared
        self.in_features, self.out_features = shape.in_features, shape.out_features
        self.cores = nn.ParameterList(
            nn.Parameter(torch.empty(size, device=device, dtype=dtype))
            for size in self._sizes(shape.core_shapes)
        )
        self.reset_parameters()

    @property
    def central(self) -> int:
        """Index of the central tensor: the largest as stored, one in common counted once."""
        shape = self._factors
        sizes = [math.prod(size) for size in self._sizes(shape.core_shapes)]
        return max(range(len(sizes)), key=lambda k: (sizes[k], k == shape.central))

    def _sizes(self, core_shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        count = self.num_experts
        return [(count, *s) if k != self.shared else s for k, s in enumerate(core_shapes)]

    def reset_parameters(self) -> None:
        """Entries of W with the variance that ``nn.Linear`` starts from."""
        self._reset_cores(1 / (3 * self.in_features))

    @classmethod
    def from_decomposition(cls, decomposition: Decomposition) -> MPOExperts:
        """A layer with the cores of :func:`mpo_kernels.cores.stack.decompose_stack`."""
        count, shared = decomposition.stacked, decomposition.shared
        layer = cls(count, decomposition.shape, shared, device="meta")
        layer.cores = nn.ParameterList(nn.Parameter(core) for core in decomposition.cores)
        return layer

    def _unformed(self) -> tuple[tuple[int, ...], Sequence[Tensor]]:
        return (self.num_experts, self.out_features, self.in_features), list(self.cores)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """``x [rows, in_features] -> [rows, out_features]``.

        Args:
            x: the rows sorted by expert.
            offsets: int32 ``[E]``, where each expert's rows end; the last is the number of rows.

        Raises:
            TypeError, ValueError: what was expected and what came.
        """
        check_input(x, self.in_features)
        if x.dim() != 2:
            raise ValueError(f"expected rows [rows, {self.in_features}], got {list(x.shape)}")
        if offsets.dtype != torch.int32 or tuple(offsets.shape) != (self.num_experts,):
            raise ValueError(
                f"expected int32 offsets [{self.num_experts}], "
                f"got {offsets.dtype} {list(offsets.shape)}"
            )
        return grouped_linear(x, list(self.cores), offsets, self.out_features)

    @torch.no_grad()
    def balance(self) -> None:
        """Each expert's cores; see :meth:`MPOModule.balance`.

        Raises:
            ValueError: they share one.
        """
        if self.shared is not None:
            raise ValueError("expected experts with cores of their own, got ones that share one")
        each = [balanced(cores, self.central) for cores in zip(*self.cores, strict=True)]
        self._replace_cores([torch.stack(cores) for cores in zip(*each, strict=True)])

    @torch.no_grad()
    def to_weight(self) -> Tensor:
        """The dense weights ``[E, out_features, in_features]``."""
        cores = [core.expand(self.num_experts, *core.shape[-4:]) for core in self.cores]
        return reconstruct_stack(cores, self.shape)

    def _check_belongs(self, core_shapes: Sequence[tuple[int, ...]]) -> None:
        of_each = [size[-4:] for size in core_shapes]
        if self._sizes(of_each) != list(core_shapes):
            raise ValueError(
                f"expected cores of {self.num_experts} experts, got shapes {list(core_shapes)}"
            )
        super()._check_belongs(of_each)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, in_factors={self.shape.in_factors}, "
            f"out_factors={self.shape.out_factors}, ranks={self.shape.ranks}, shared={self.shared}"
        )
