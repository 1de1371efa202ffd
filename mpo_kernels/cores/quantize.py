"""Cores of one byte an element, int8 or e4m3, with fp32 scales of their slices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The largest value that a slice is scaled to.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Of GPTQ: what is added to a diagonal, relative to its mean; columns between two large products.
_DAMPING, _BLOCK = 1e-4, 128
_TINY = torch.finfo(torch.float32).tiny


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


def quantize_interpolative(
    cores: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """T ``[m − r, r]`` and B ``[r, n]`` of one byte an element, and their fp32 scales.

    They are of T's rows ``[m − r]``, of B's rows ``[r]`` and of T's columns ``[r]``. B is rounded
    to the nearest. T becomes what makes of that the old T B by least squares, and is rounded a
    column at a time, those that are left making up for what is lost (Frantar et al., "GPTQ", 2023).

    Args:
        cores: T and B, finite, or on meta.
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.
    """
    coefficients, pivots = cores
    codes, scale = _scaled(pivots, 0, dtype)
    if coefficients.is_meta or not coefficients.numel():
        left, rows = _scaled(coefficients, 0, dtype)
        return [left, codes], [rows, scale, torch.ones_like(scale)]
    made = codes.double() * scale.double()[:, None]
    gram = made @ made.t()
    # Of the mean, so that no small row is used without measure to make up for the large ones.
    gram.diagonal().add_(_DAMPING * gram.diagonal().mean() + _TINY)
    factor = torch.linalg.cholesky(gram)
    change = torch.cholesky_solve(made @ (pivots.double() - made).t(), factor).t()
    fitted = coefficients.double()
    fitted = fitted + fitted @ change
    largest = fitted.abs().amax(1, keepdim=True).clamp_min(_TINY)
    columns = (fitted / largest).abs().amax(0).float().clamp_min(_TINY)
    fitted = fitted / columns
    left, rows = _scaled(fitted, 0, dtype)
    steps = rows.double()
    passed = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True) / columns
    for start in range(0, len(gram), _BLOCK):
        block = slice(start, start + _BLOCK)
        lost = torch.zeros_like(fitted[:, block])
        for k, column in enumerate(lost.t(), start):
            left[:, k] = _codes(fitted[:, k] / steps, dtype)
            column.copy_((fitted[:, k] - left[:, k].double() * steps) / passed[k, k])
            fitted[:, block] -= torch.outer(column, passed[k, block])
        fitted[:, block.stop :] -= lost @ passed[block, block.stop :]
    return [left, codes], [rows, scale, columns]


def _scaled(core: Tensor, axis: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes, and a scale for each slice along the axis."""
    core = core.float()
    others = [other for other in range(core.dim()) if other != axis]
    scale = core.abs().amax(others, keepdim=True).clamp_min(_TINY)
    scale = scale / LARGEST[dtype]
    return _codes(core / scale, dtype), scale.flatten()


def _codes(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest that there are."""
    scaled = scaled.clamp(-LARGEST[dtype], LARGEST[dtype])
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype)


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


def dequantize_interpolative(
    cores: Sequence[Tensor], scales: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """The T ``[m − r, r]`` and B ``[r, n]`` that they stand for, in ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    coefficients, pivots = (core.to(wide) for core in cores)
    rows, scale, columns = scales
    return [(rows[:, None] * coefficients * columns).to(dtype), (scale[:, None] * pivots).to(dtype)]
