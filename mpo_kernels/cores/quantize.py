"""Cores of one byte an element: int8 or e4m3, a scale for each slice of a bond."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The largest value that a slice is scaled to.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize(cores: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Cores of one byte an element, and an fp32 scale ``[D_k]`` for each bond between them.

    Core k stands for ``core[..., d] · scales[k][d]``; what the last one was divided by, along its
    first bond, is in the same scales, which a contraction meets once.

    Args:
        cores: core k ``[D_k, i_k, j_k, D_{k+1}]``, at least two, finite.
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.
    """
    largest = LARGEST[dtype]

    def scaled(core: Tensor, bond: int) -> tuple[Tensor, Tensor]:
        others = [axis for axis in range(4) if axis != bond]
        scale = core.abs().amax(others, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        scale = scale / largest
        codes = core / scale
        return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale.flatten()

    pairs = [scaled(core.float(), 3) for core in cores[:-1]]
    last, scale = scaled(cores[-1].float(), 0)
    scales = [scale for _, scale in pairs]
    scales[-1] = scales[-1] * scale
    return [*(core for core, _ in pairs), last], scales


def dequantize(
    cores: Sequence[Tensor], scales: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """What they stand for, in ``dtype``; core k ``[D_k, i_k, j_k, D_{k+1}]``.

    A bond's scale goes into both its cores by halves, so that neither leaves fp16's range.
    """
    halves = [scale.sqrt() for scale in scales]
    one = halves[0].new_ones(1)
    return [
        (core.float() * left[:, None, None, None] * right).to(dtype)
        for core, left, right in zip(cores, [one, *halves], [*halves, one], strict=True)
    ]
