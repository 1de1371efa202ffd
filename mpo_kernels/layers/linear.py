"""MPOLinear: ``nn.Linear`` whose weight is a matrix product operator, never formed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpo_kernels.cores.decompose import Decomposition, decompose, reconstruct
from mpo_kernels.cores.shape import MPOShape
from mpo_kernels.layers.module import MPOModule, merged_for, plan_for
from mpo_kernels.layers.quantized import QuantizedMPOLinear
from mpo_kernels.ops.functional import check_input
from mpo_kernels.ops.functional import linear as contract
from mpo_kernels.planning.plan import Gradients, Plan


class _Names(dict[int, tuple[str, ...]]):
    """Of the parameters of a list of so many."""

    def __missing__(self, count: int) -> tuple[str, ...]:
        self[count] = tuple(map(str, range(count)))
        return self[count]


_NAMES = _Names()


class MPOLinear(MPOModule):
    """Drop-in for ``nn.Linear``: ``[..., in_features] -> [..., out_features]``.

    Equivalent to ``F.linear(x, reconstruct(cores), bias)``, computed from the cores.

    Args:
        in_features: size of x's last dimension.
        out_features: size of the output's last dimension.
        shape: factors and bonds, for these sizes.
        bias: add a learned bias ``[out_features]``.
        device, dtype: of the parameters.

    Raises:
        ValueError: a shape for other sizes.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        shape: MPOShape,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(shape, device, dtype)
        if (shape.in_features, shape.out_features) != (in_features, out_features):
            raise ValueError(
                f"expected a shape for {in_features} -> {out_features}, "
                f"got one for {shape.in_features} -> {shape.out_features}"
            )
        self.in_features, self.out_features = in_features, out_features
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Entries of W and of the bias with the variance that ``nn.Linear`` starts from."""
        self._reset_cores(1 / (3 * self.in_features))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.in_features**-0.5), self.in_features**-0.5)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        shape: MPOShape | None = None,
        *,
        max_rank: int | None = None,
        rel_error: float | None = None,
        compression: float | None = None,
    ) -> MPOLinear:
        """Decompose a dense layer; exact unless a bound or ``shape.ranks`` cuts.

        Args:
            linear: not changed; its bias is copied.
            shape: factors and caps on the bonds; by default five balanced factors at full rank.
            max_rank, rel_error, compression: see :func:`mpo_kernels.decompose`.
        """
        shape = shape or MPOShape.balanced(linear.in_features, linear.out_features)
        decomposition = decompose(
            linear.weight, shape, max_rank=max_rank, rel_error=rel_error, compression=compression
        )
        return cls.from_decomposition(decomposition, linear.bias)

    @classmethod
    def from_decomposition(
        cls, decomposition: Decomposition, bias: Tensor | None = None
    ) -> MPOLinear:
        """A layer with the cores of a decomposition and a copy of ``bias [out_features]``."""
        shape = decomposition.shape
        layer = cls(shape.in_features, shape.out_features, shape, bias is not None, device="meta")
        layer.cores = nn.ParameterList(
            nn.Parameter(core.contiguous()) for core in decomposition.cores
        )
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    @property
    def weight(self) -> Tensor:
        """Size and dtype of the dense weight ``[out, in]``, on the meta device: it has no values.

        For code that asks ``layer.weight.dtype``; the values are ``to_linear().weight``.
        """
        size = (self.out_features, self.in_features)
        return torch.empty(size, dtype=self.cores[0].dtype, device="meta")

    def oriented_cores(self) -> list[Tensor]:
        """The cores as ``[D_k, in_k, out_k, D_{k+1}]``."""
        # Attributes of modules and iterating over a ParameterList cost microseconds together.
        parameters = self._modules["cores"]._parameters  # type: ignore[union-attr]
        # Pruned or parametrised, the list has to give them.
        if tuple(parameters) == _NAMES[len(parameters)]:
            return list(parameters.values())
        return list(self.cores)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features] -> [..., out_features]``."""
        check_input(x, self.in_features)
        # An attribute of a module costs as much as a check of all tensors.
        parameters = self._parameters
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        return contract(x, self.oriented_cores(), bias, self.out_features)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer, with a copy of the bias."""
        weight = reconstruct(
            self.oriented_cores(), in_features=self.in_features, out_features=self.out_features
        )
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear

    @torch.no_grad()
    def merged(self, rows: int) -> MPOLinear:
        """The same matrix held as the parts that the plan for ``rows`` rows merges, for serving.

        Merging happens at every call, since cores may change; at few rows it is most of the time.
        The new layer has fewer, larger cores of its own, a copy of the bias, and this layer's
        mode (training or not); all its parameters train.
        """
        parts = merged_for(self.oriented_cores(), rows, self.in_features, self.out_features)
        shape = MPOShape.of_cores(
            [part.shape for part in parts], self.in_features, self.out_features
        )
        layer = MPOLinear(self.in_features, self.out_features, shape, bias=False, device="meta")
        layer.cores = nn.ParameterList(nn.Parameter(part) for part in parts)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone())
        return layer.train(self.training)

    def quantized(self, dtype: torch.dtype = torch.int8) -> QuantizedMPOLinear:
        """The same layer with cores of one byte an element, for serving.

        Reading cores is what few rows cost. Merge first where the plan would
        (``layer.merged(rows).quantized()``): bytes are not merged at a call.

        Args:
            dtype: ``torch.int8`` or ``torch.float8_e4m3fn``; each slice of a bond has a scale.

        Raises:
            ValueError: another dtype, one core, or NaN or Inf in a core.
        """
        return QuantizedMPOLinear(self, dtype)

    def plan(self, rows: int, backward: bool = False) -> Plan:
        """How ``rows`` rows (the product of x's leading dimensions) are computed, and why.

        ``backward`` plans the pass that forms dx and the gradients of the cores that train.
        """
        gradients = Gradients(True, tuple(core.requires_grad for core in self.cores))
        features = (self.in_features, self.out_features)
        return plan_for(self.oriented_cores(), rows, features, gradients if backward else None)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"in_factors={self.shape.in_factors}, out_factors={self.shape.out_factors}, "
            f"ranks={self.shape.ranks}, bias={self.bias is not None}"
        )
