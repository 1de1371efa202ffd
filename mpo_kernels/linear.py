"""MPOLinear: ``nn.Linear`` whose weight is a matrix product operator, never formed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpo_kernels import backends, ops
from mpo_kernels.cores import merge_cores
from mpo_kernels.decompose import (
    Decomposition,
    decompose,
    reconstruct,
    round_cores,
)
from mpo_kernels.gauge import balanced
from mpo_kernels.plan import Gradients, Plan, groups
from mpo_kernels.quantized import QuantizedMPOLinear
from mpo_kernels.shape import MPOShape


def _plan(
    cores: Sequence[Tensor],
    rows: int,
    features: tuple[int, int],
    gradients: Gradients | None = None,
) -> Plan:
    if not isinstance(rows, int) or isinstance(rows, bool):
        raise TypeError(f"expected a number of rows, got {type(rows).__name__}")
    if rows < 1:
        raise ValueError(f"expected at least one row, got {rows}")
    like = cores[0]
    backend = backends.selected(like)
    return backend.plan_for(rows, like.dtype, like.device, cores, gradients, features)


def merged_for(
    cores: Sequence[Tensor], rows: int, in_features: int, out_features: int
) -> list[Tensor]:
    """The cores as the parts that the plan for ``rows`` rows merges, contiguous copies.

    For :func:`mpo_kernels.mpo_linear` with cores that do not change any more.
    """
    split = _plan(cores, rows, (in_features, out_features)).split
    parts = [merge_cores(cores[a:b]) for a, b in groups(split, len(cores))]
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


class MPOModule(nn.Module):
    """What layers held as cores share: parameters, freezing, rounding, loading at other ranks.

    Attributes:
        cores: ParameterList; core k is ``[D_k, i_k, j_k, D_{k+1}]``.
    """

    cores: nn.ParameterList

    def __init__(
        self, shape: MPOShape, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        if not isinstance(shape, MPOShape):
            raise TypeError(f"expected an MPOShape, got {type(shape).__name__}")
        self._factors = shape.with_ranks(None)
        self.cores = nn.ParameterList(
            nn.Parameter(torch.empty(core, device=device, dtype=dtype))
            for core in shape.core_shapes
        )

    @property
    def shape(self) -> MPOShape:
        """Factors, and the bonds that the cores have now."""
        return self._factors.with_ranks([core.shape[3] for core in list(self.cores)[:-1]])

    @property
    def central(self) -> int:
        """Index of the central tensor."""
        return self._factors.central

    def _reset_cores(self, variance: float) -> None:
        """Normal cores whose product has entries of this variance."""
        shape = self.shape
        each = (variance / math.prod(shape.ranks)) ** (0.5 / shape.num_cores)
        for core in self.cores:
            nn.init.normal_(core, std=each)

    def freeze_central(self) -> None:
        """Train only the auxiliary cores (and the bias): no gradient of the centre is computed."""
        for k, core in enumerate(self.cores):
            core.requires_grad_(k != self.central)

    def unfreeze(self) -> None:
        """Train every core."""
        for core in self.cores:
            core.requires_grad_(True)

    def balance(self) -> None:
        """Bring the cores, in place, into the form that light fine-tuning learns best in.

        The matrix stays the same; see :func:`mpo_kernels.gauge.balanced`. To be called before
        there is an optimizer, and not for layers that share a core with others.
        """
        self._replace_cores(balanced(list(self.cores), self.central))

    def _replace_cores(self, cores: Sequence[Tensor]) -> None:
        """The parameters stay the same objects."""
        for parameter, core in zip(self.cores, cores, strict=True):
            parameter.data, parameter.grad = core, None

    def round(
        self,
        *,
        max_rank: int | None = None,
        rel_error: float | None = None,
        ranks: Iterable[int] | None = None,
        second_moment: Tensor | None = None,
    ) -> Decomposition:
        """Cut the bonds in place, from canonical form; see :func:`mpo_kernels.round_cores`.

        The parameters stay the same objects, so an optimizer goes on training them; what it
        remembers of their old size must be dropped (``optimizer.state.pop(parameter)``).
        """
        rounded = round_cores(
            list(self.cores),
            max_rank=max_rank,
            rel_error=rel_error,
            ranks=ranks,
            in_features=self.shape.in_features,
            out_features=self.shape.out_features,
            second_moment=second_moment,
        )
        self._replace_cores(rounded.cores)
        return rounded

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [f"{prefix}cores.{k}" for k in range(len(self.cores))]
        loaded = [tuple(state_dict[name].shape) for name in names if name in state_dict]
        if len(loaded) == len(names) and loaded != list(self.shape.core_shapes):
            try:
                self._check_belongs(loaded)
            except ValueError as error:
                # The cores would be half loaded: refuse them all.
                error_msgs.append(f"{prefix}cores: {error}")
            else:
                for parameter, size in zip(self.cores, loaded, strict=True):
                    parameter.data, parameter.grad = parameter.data.new_empty(size), None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _check_belongs(self, core_shapes: Sequence[tuple[int, ...]]) -> None:
        """Raise a ValueError unless these are the shapes of cores with this layer's factors."""
        bonds = [size[-1] for size in core_shapes[:-1] if size]
        if list(self._factors.with_ranks(bonds).core_shapes) != list(core_shapes):
            raise ValueError(
                f"expected cores with factors {self._factors.in_factors} and "
                f"{self._factors.out_factors}, got shapes {list(core_shapes)}"
            )


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
        layer.cores = nn.ParameterList(nn.Parameter(core) for core in decomposition.cores)
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

    def _oriented_cores(self) -> list[Tensor]:
        """The cores as ``[D_k, in_k, out_k, D_{k+1}]``."""
        # Attributes of modules and iterating over a ParameterList cost microseconds together.
        parameters = self._modules["cores"]._parameters  # type: ignore[union-attr]
        # Pruned or parametrised, the list has to give them.
        if tuple(parameters) == _NAMES[len(parameters)]:
            return list(parameters.values())
        return list(self.cores)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features] -> [..., out_features]``."""
        ops.check_input(x, self.in_features)
        # An attribute of a module costs as much as a check of all tensors.
        parameters = self._parameters
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        return ops.linear(x, self._oriented_cores(), bias, self.out_features)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer, with a copy of the bias."""
        weight = reconstruct(
            self._oriented_cores(), in_features=self.in_features, out_features=self.out_features
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
        parts = merged_for(self._oriented_cores(), rows, self.in_features, self.out_features)
        shape = MPOShape(
            [part.shape[1] for part in parts],
            [part.shape[2] for part in parts],
            [part.shape[3] for part in parts[:-1]],
            in_features=self.in_features,
            out_features=self.out_features,
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
        return _plan(self._oriented_cores(), rows, features, gradients if backward else None)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"in_factors={self.shape.in_factors}, out_factors={self.shape.out_factors}, "
            f"ranks={self.shape.ranks}, bias={self.bias is not None}"
        )
