"""The torch back end: both contractions in library GEMMs, on any device and in any dtype.

Every function takes ``x [rows, in]`` and cores, never the dense weight. Backward recomputes what it
needs from x and the cores. See ``mpo_kernels/plan.py`` for the costs and the choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpo_kernels.backends.torch import chain, panels
from mpo_kernels.backends.torch.gather import embedding, embedding_backward
from mpo_kernels.figures import device_figures
from mpo_kernels.plan import Gradients, Plan, plan_linear, shapes_of
from mpo_kernels.quantize import dequantize

__all__ = [
    "embedding",
    "embedding_backward",
    "linear",
    "linear_backward",
    "plan_for",
    "quantized_linear",
]

ALGORITHMS = {"chain": chain, "panels": panels}


def plan_for(
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    cores: Sequence[Tensor],
    gradients: Gradients | None = None,
    features: tuple[int, int] | None = None,
) -> Plan:
    """The plan for ``x [rows, in]``, forward or (with ``gradients``) backward.

    ``features``, the true in and out of a padded layer, makes no difference here.
    """
    figures = device_figures(device, dtype)
    return plan_linear(shapes_of(cores), rows, dtype, figures, gradients)


def linear(
    x: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None,
    out_features: int,
    plan: Plan | None = None,
) -> Tensor:
    """``y [rows, out_features]`` of ``x [rows, in]``, all of one dtype."""
    y = x.new_empty(x.shape[0], out_features)
    if x.shape[0] == 0:
        return y
    plan = plan or plan_for(x.shape[0], x.dtype, x.device, cores)
    ALGORITHMS[plan.algorithm].forward(x, cores, bias, y, plan)
    return y


def quantized_linear(
    x: Tensor,
    cores: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    """:func:`linear` with cores of one byte an element, widened; see ``quantize.py``."""
    return linear(x, dequantize(cores, scales, x.dtype), bias, out_features)


def linear_backward(
    grad: Tensor,
    x: Tensor,
    cores: Sequence[Tensor],
    gradients: Gradients,
    plan: Plan | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """``dx [rows, in]`` and each core's gradient, ``None`` (and not computed) where not asked."""
    if x.shape[0] == 0:
        empty = [
            torch.zeros_like(core) if need else None
            for core, need in zip(cores, gradients.cores, strict=True)
        ]
        return (x.new_empty(x.shape) if gradients.x else None), empty
    plan = plan or plan_for(x.shape[0], x.dtype, x.device, cores, gradients)
    return ALGORITHMS[plan.algorithm].backward(grad, x, cores, gradients, plan)
