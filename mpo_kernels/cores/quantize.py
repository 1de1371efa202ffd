"""Cores of one byte an element: int8 or e4m3, a scale for each slice of a bond, or each row."""

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
    pairs = [_scaled(core, 3, dtype) for core in cores[:-1]]
    last, scale = _scaled(cores[-1], 0, dtype)
    scales = [scale for _, scale in pairs]
    scales[-1] = scales[-1] * scale
    return [*(core for core, _ in pairs), last], scales


def quantize_rows(
    matrices: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices ``[m, n]``, finite, of one byte an element, and for each an fp32 scale a row."""
    codes, scales = zip(*(_scaled(matrix, 0, dtype) for matrix in matrices), strict=True)
    return list(codes), list(scales)


def _scaled(core: Tensor, axis: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes, and a scale for each slice along the axis."""
    core = core.float()
    others = [other for other in range(core.dim()) if other != axis]
    scale = core.abs().amax(others, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    scale = scale / LARGEST[dtype]
    codes = core / scale
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale.flatten()


def dequantize(
    cores: Sequence[Tensor], scales: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """What they stand for, in ``dtype``; core k ``[D_k, i_k, j_k, D_{k+1}]``.

    A bond's scale goes into both its cores by halves, so that neither leaves fp16's range.
    """
    wide = torch.promote_types(dtype, torch.float32)
    halves = [scale.to(wide).sqrt() for scale in scales]
    one = halves[0].new_ones(1)
    return [
        (core.to(wide) * left[:, None, None, None] * right).to(dtype)
        for core, left, right in zip(cores, [one, *halves], [*halves, one], strict=True)
    ]


def dequantize_rows(
    matrices: Sequence[Tensor], scales: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """What they stand for, in ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    return [
        (matrix.to(wide) * scale[:, None]).to(dtype)
        for matrix, scale in zip(matrices, scales, strict=True)
    ]
