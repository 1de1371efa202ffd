"""MPOLinear: ``nn.Linear`` whose weight is a matrix product operator, never formed.

And InterpolativeLinear, of low rank in the fewest numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpo_kernels.cores.chain import check_finite
from mpo_kernels.cores.decompose import Decomposition, decompose, reconstruct
from mpo_kernels.cores.gauge import interpolated
from mpo_kernels.cores.shape import MPOShape
from mpo_kernels.layers.cost import LayerCost
from mpo_kernels.layers.module import MPOModule, check_rows, merged_for, plan_for
from mpo_kernels.layers.quantized import QuantizedInterpolativeLinear, QuantizedMPOLinear
from mpo_kernels.layers.unformed import UnformedLayer
from mpo_kernels.ops.functional import check_input, interpolative
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
        cores = [core.contiguous() for core in decomposition.cores]
        return cls._of_cores(cores, shape.in_features, shape.out_features, bias)

    @classmethod
    def _of_cores(
        cls, cores: Sequence[Tensor], in_features: int, out_features: int, bias: Tensor | None
    ) -> MPOLinear:
        """A layer with these cores, not copied, and a copy of the bias."""
        shape = MPOShape.of_cores([core.shape for core in cores], in_features, out_features)
        layer = cls(in_features, out_features, shape, bias is not None, device="meta")
        layer.cores = nn.ParameterList(nn.Parameter(core) for core in cores)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    def _unformed(self) -> tuple[tuple[int, int], Sequence[Tensor]]:
        return (self.out_features, self.in_features), list(self.cores)

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
        if not isinstance(x, Tensor) or x.is_nested:
            return self._of(x, 1)
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
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, "meta", weight.dtype
        )
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
        features = self.in_features, self.out_features
        parts = merged_for(self.oriented_cores(), rows, *features)
        return MPOLinear._of_cores(parts, *features, self.bias).train(self.training)

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

    @torch.no_grad()
    def interpolative(self) -> InterpolativeLinear:
        """The same matrix of plain low rank, in r (in + out − r) numbers in place of r (in + out).

        The new layer has a copy of the bias, and this layer's mode; all its parameters train.

        Raises:
            ValueError: other factors than ``(1, in)`` and ``(out, 1)``, or NaN or Inf in a core.
        """
        cores = self.oriented_cores()
        factors = list(zip(*(core.shape[1:3] for core in cores), strict=True))
        wanted = [(1, self.in_features), (self.out_features, 1)]
        if factors != wanted:
            raise ValueError(
                f"expected low rank, in and out factors {wanted[0]} and {wanted[1]}, "
                f"got {factors[0]} and {factors[1]}"
            )
        check_finite(cores)
        *cores, order = interpolated(cores[0][0, 0], cores[1][:, :, 0, 0])
        features = self.in_features, self.out_features
        layer = InterpolativeLinear(*features, len(cores[1]), self.bias is not None, device="meta")
        layer.cores = nn.ParameterList(nn.Parameter(core) for core in cores)
        layer.order = order
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone())
        return layer.train(self.training)

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


class InterpolativeLinear(UnformedLayer):
    """Drop-in for ``nn.Linear`` of rank r, in r (m + n − r) numbers and as many multiply-adds.

    Of the weight ``[m, n]`` it holds r rows, B, and what makes the others of them, T B: with
    z = x Bᵀ the output is z beside z Tᵀ, in the order of the rows. Below full rank that is always
    less than dense. Made of an :class:`MPOLinear` by ``layer.interpolative()``; the source is that
    of :func:`mpo_kernels.cores.gauge.interpolated`.

    Attributes:
        cores: ParameterList of T ``[m − r, r]`` and B ``[r, n]``.
        order: int64 ``[m]``, a buffer: where in ``cat(z, z Tᵀ)`` each output stands.

    Args:
        in_features: n, size of x's last dimension.
        out_features: m, size of the output's last dimension.
        rank: r, at least 1, at most the smaller of the two.
        bias: add a learned bias ``[out_features]``.
        device, dtype: of the parameters.

    Raises:
        ValueError: another rank.
    """

    bias: nn.Parameter | None
    order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"expected a rank from 1 to {min(in_features, out_features)}, got {rank}"
            )
        self.in_features, self.out_features = in_features, out_features
        sizes = (out_features - rank, rank), (rank, in_features)
        self.cores = nn.ParameterList(
            nn.Parameter(torch.empty(size, device=device, dtype=dtype)) for size in sizes
        )
        order = torch.arange(out_features, dtype=torch.int64, device=device)
        self.register_buffer("order", order)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Entries of W and of the bias with the variance that ``nn.Linear`` starts from."""
        coefficients, pivots = self.cores
        nn.init.normal_(coefficients, std=self.rank**-0.5)
        nn.init.normal_(pivots, std=(3 * self.in_features) ** -0.5)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.in_features**-0.5), self.in_features**-0.5)

    @property
    def rank(self) -> int:
        return self.cores[1].shape[0]

    @property
    def shape(self) -> MPOShape:
        """That of the same matrix as an :class:`MPOLinear`, which has r² parameters more."""
        return MPOShape.low_rank(self.in_features, self.out_features, self.rank)

    @property
    def central(self) -> int:
        """Index of the larger core."""
        return int(self.cores[1].numel() >= self.cores[0].numel())

    def freeze_central(self) -> None:
        """Train only the smaller core (and the bias): no gradient of the larger is computed."""
        for k, core in enumerate(self.cores):
            core.requires_grad_(k != self.central)

    def unfreeze(self) -> None:
        """Train both cores."""
        self.cores.requires_grad_(True)

    def _unformed(self) -> tuple[tuple[int, int], Sequence[Tensor]]:
        held = [core for core in self.cores if core.numel()]  # at full rank there is no T
        return (self.out_features, self.in_features), held

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features] -> [..., out_features]``."""
        if not isinstance(x, Tensor) or x.is_nested:
            return self._of(x, 1)
        check_input(x, self.in_features)
        coefficients, pivots = self.cores
        return interpolative(x, coefficients, pivots, self.order, self.bias)

    @torch.no_grad()
    def to_mpo(self) -> MPOLinear:
        """Plain low rank: two cores of its own, r² numbers more, and a copy of the bias.

        The new layer has this layer's mode; all its parameters train.
        """
        coefficients, pivots = self.cores
        one = torch.eye(self.rank, dtype=pivots.dtype, device=pivots.device)
        left = torch.cat((one, coefficients))[self.order]
        cores = left[None, None], pivots.clone()[:, :, None, None]
        layer = MPOLinear._of_cores(cores, self.in_features, self.out_features, self.bias)
        return layer.train(self.training)

    @torch.no_grad()
    def merged(self, rows: int) -> MPOLinear | InterpolativeLinear:
        """A copy as ``rows`` rows are computed with fastest, for serving: so, or as plain low rank.

        The outputs have to be put in order, which may cost more than r² multiply-adds a row save.
        """
        check_rows(rows)
        like = self.cores[1]
        here = LayerCost("latency", rows, like.dtype, like.device, interpolative=True)
        there = LayerCost("latency", rows, like.dtype, like.device)
        if here.of(self.shape) <= there.of(self.shape):
            return copy.deepcopy(self)
        return self.to_mpo().merged(rows)

    def quantized(self, dtype: torch.dtype = torch.int8) -> QuantizedInterpolativeLinear:
        """The same layer with cores of one byte an element, for serving.

        Args:
            dtype: ``torch.int8`` or ``torch.float8_e4m3fn``; each row of a core has a scale, and
                what is made of rows makes up for what these lose.

        Raises:
            ValueError: another dtype, or NaN or Inf in a core.
        """
        return QuantizedInterpolativeLinear(self, dtype)

    def to_linear(self) -> nn.Linear:
        """The dense layer, with a copy of the bias."""
        return self.to_mpo().to_linear()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )
