"""Layers for serving whose cores are held in one byte an element."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from mpo_kernels.cores.chain import check_finite
from mpo_kernels.cores.decompose import reconstruct
from mpo_kernels.cores.quantize import (
    LARGEST,
    dequantize,
    dequantize_interpolative,
    quantize,
    quantize_interpolative,
)
from mpo_kernels.cores.shape import MPOShape
from mpo_kernels.layers.module import merged_for, plan_for
from mpo_kernels.layers.unformed import UnformedLayer, as_it_lay
from mpo_kernels.ops.functional import check_input, interpolative
from mpo_kernels.planning.plan import Plan

Quantize: TypeAlias = Callable[[Sequence[Tensor], torch.dtype], tuple[list[Tensor], list[Tensor]]]


class LinearLayer(Protocol):
    """An :class:`MPOLinear`, as far as its cores are read."""

    in_features: int
    out_features: int
    bias: Any

    def oriented_cores(self) -> list[Tensor]:
        """The cores as ``[D_k, in_k, out_k, D_{k+1}]``."""


class QuantizedLayer(UnformedLayer):
    """A linear layer for serving whose cores are held in one byte an element and do not train.

    ``.to(dtype)`` changes the bias alone.

    Attributes:
        bias: ``[out_features]`` or None.
    """

    bias: Tensor | None
    shape: MPOShape

    def __init__(
        self, layer: Any, cores: Sequence[Tensor], dtype: torch.dtype, quantize: Quantize
    ) -> None:
        super().__init__()
        if dtype not in LARGEST:
            known = [str(each) for each in LARGEST]
            raise ValueError(f"expected a dtype of {known}, got {dtype}")
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = dtype
        with torch.no_grad():
            has_values = not cores[0].is_meta  # a checkpoint is loaded into a layer on meta
            if has_values:
                check_finite(cores)
            quantized, scales = quantize(cores, dtype)
            if has_values and not all(scale.isfinite().all() for scale in scales):
                raise ValueError("expected cores within the range of fp32")
        # A state says by its names how its bytes are to be read.
        self._prefix = str(dtype).removeprefix("torch.")
        self._counts = len(quantized), len(scales)
        for k, core in enumerate(quantized):
            # As bytes, which no cast of a module touches.
            self.register_buffer(f"{self._prefix}_core_{k}", core.view(torch.int8))
        for k, scale in enumerate(scales):
            self.register_buffer(f"scale_{k}", scale)
        bias = None if layer.bias is None else layer.bias.detach().clone()
        self.register_buffer("bias", bias)

    @property
    def codes(self) -> list[Tensor]:
        """The buffers that hold the cores, int8 of either dtype."""
        return [getattr(self, f"{self._prefix}_core_{k}") for k in range(self._counts[0])]

    @property
    def cores(self) -> list[Tensor]:
        """int8 or e4m3."""
        return [codes.view(self.dtype) for codes in self.codes]

    @property
    def scales(self) -> list[Tensor]:
        """fp32."""
        return [getattr(self, f"scale_{k}") for k in range(self._counts[1])]

    def _unformed(self) -> tuple[tuple[int, int], Sequence[Tensor]]:
        return (self.out_features, self.in_features), [c for c in self.codes if c.numel()]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {f"scale_{k}": scale.view(torch.int32) for k, scale in enumerate(self.scales)}
        super()._apply(lambda tensor: as_it_lay(fn(tensor), tensor), recurse)
        for name, bits in kept.items():
            setattr(self, name, fn(bits).view(torch.float32))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features] -> [..., out_features]``; a gradient for x alone."""
        if not isinstance(x, Tensor) or x.is_nested:
            return self._of(x, 1)
        check_input(x, self.in_features)
        kind = x.device.type
        if (
            torch.amp.is_autocast_available(kind)
            and torch.is_autocast_enabled(kind)
            and x.dtype != torch.float64
        ):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self._computed(x, None if self.bias is None else self.bias.to(x.dtype))

    @abstractmethod
    def _computed(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The output, in the dtype of both."""

    @abstractmethod
    def _formed(self) -> Tensor:
        """The fp32 weight ``[out_features, in_features]`` that the bytes stand for."""

    def quantized(self, dtype: torch.dtype = torch.int8) -> QuantizedLayer:
        """Refused.

        Raises:
            ValueError: always; what was rounded once is not rounded again.
        """
        raise ValueError(
            f"expected cores of 16 bits or more, got {self.dtype}: quantize the layer as it was"
        )

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """The dense layer that the bytes stand for, in ``dtype``, with a copy of the bias."""
        sizes = self.in_features, self.out_features
        linear = nn.Linear(*sizes, self.bias is not None, "meta", dtype)
        linear.weight = nn.Parameter(self._formed().to(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype, copy=True))
        return linear


class QuantizedMPOLinear(QuantizedLayer):
    """An :class:`MPOLinear` for serving, by ``layer.quantized(dtype)``; its cores do not train.

    At up to sixteen rows in fp16 or bf16 the CUDA back end reads the bytes as they are; elsewhere
    cores are widened to x's dtype at every call. Cores ``[D_k, i_k, j_k, D_{k+1}]`` have a scale
    for each slice of a bond, ``[D_k]`` for each between them.

    Attributes:
        bias: ``[out_features]`` or None.
    """

    def __init__(self, layer: LinearLayer, dtype: torch.dtype) -> None:
        cores = layer.oriented_cores()
        if len(cores) < 2:
            raise ValueError("expected a layer of two cores or more, got one")
        super().__init__(layer, cores, dtype, quantize)
        shapes = [core.shape for core in cores]
        self.shape = MPOShape.of_cores(shapes, self.in_features, self.out_features)

    def _computed(self, x: Tensor, bias: Tensor | None) -> Tensor:
        cores, scales, out_features = self.cores, self.scales, self.out_features
        if torch.is_grad_enabled() and x.requires_grad:
            widened = dequantize(cores, scales, x.dtype)
            return torch.ops.mpo_kernels.linear(x, widened, bias, out_features)
        return torch.ops.mpo_kernels.quantized_linear(x, cores, scales, bias, out_features)

    def _formed(self) -> Tensor:
        cores = dequantize(self.cores, self.scales, torch.float32)
        return reconstruct(cores, in_features=self.in_features, out_features=self.out_features)

    def merged(self, rows: int) -> QuantizedMPOLinear:
        """A copy whose cores lie as ``rows`` rows read them fastest; bytes are not merged."""
        layer = copy.deepcopy(self)
        parts = merged_for(self.codes, rows, self.in_features, self.out_features, self.dtype)
        for k, part in enumerate(parts):
            layer.register_buffer(f"{self._prefix}_core_{k}", part)
        return layer

    def plan(self, rows: int, dtype: torch.dtype = torch.bfloat16) -> Plan:
        """How ``rows`` rows of x in ``dtype`` (fp16 and bf16 may read bytes) are computed, and why.

        What widens the cores first has that in its bytes and its predicted time.
        """
        cores, features = self.cores, (self.in_features, self.out_features)
        like = cores[0].new_empty(0, self.in_features, dtype=dtype)
        check_input(like, self.in_features)
        return plan_for(cores, rows, features, like=like)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"in_factors={self.shape.in_factors}, out_factors={self.shape.out_factors}, "
            f"ranks={self.shape.ranks}, bias={self.bias is not None}, dtype={self.dtype}"
        )


class QuantizedInterpolativeLinear(QuantizedLayer):
    """An :class:`InterpolativeLinear` for serving, by ``layer.quantized(dtype)``.

    Each row and each column of T ``[m − r, r]`` has a scale, and each row of B ``[r, n]``; they are
    widened to x's dtype at every call. It is for size: what the CUDA back end reads as bytes is
    ``layer.to_mpo().quantized(dtype)``, r² numbers more.

    Attributes:
        order: int64 ``[m]``, where each output stands; see :class:`InterpolativeLinear`.
        bias: ``[out_features]`` or None.
    """

    order: Tensor

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__(layer, list(layer.cores), dtype, quantize_interpolative)
        self.shape = layer.shape
        self.register_buffer("order", layer.order.clone())

    @property
    def rank(self) -> int:
        return len(self.codes[1])

    def _computed(self, x: Tensor, bias: Tensor | None) -> Tensor:
        coefficients, pivots = dequantize_interpolative(self.cores, self.scales, x.dtype)
        return interpolative(x, coefficients, pivots, self.order, bias)

    def _formed(self) -> Tensor:
        coefficients, pivots = dequantize_interpolative(self.cores, self.scales, torch.float32)
        return torch.cat((pivots, coefficients @ pivots))[self.order]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}, dtype={self.dtype}"
        )
