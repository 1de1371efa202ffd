"""Buffers between bands of NaN: what is read or written past an end is seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BAND = 64


class Guards:
    """Buffers between bands of NaN, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[Tensor] = []

    def empty(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Poisoned: NaN all over."""
        count = math.prod(size)
        buffer = torch.full((count + 2 * BAND,), math.nan, dtype=dtype, device=self.device)
        self._buffers.append(buffer)
        return buffer[BAND : BAND + count].view(size)

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values and strides, in a buffer that is NaN wherever the tensor has no value."""
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((n - 1) * stride for n, stride in sizes) if tensor.numel() else 0
        flat = self.empty((span,), tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride(), BAND).copy_(tensor)

    def check(self) -> None:
        for buffer in self._buffers:
            assert buffer[:BAND].isnan().all() and buffer[-BAND:].isnan().all()
