"""Rows sorted by expert times the matrices of their experts, dense or held as chains of cores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from mpo_kernels.cores.chain import merge_cores
from mpo_kernels.planning.candidates import chain_steps
from mpo_kernels.planning.plan import CoreShape, Step, groups, merged_parts, row_bucket
from mpo_kernels.planning.work import merge_work


def grouped_mm(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """Each expert's rows times its matrix: ``x [rows, k], matrices [E, k, m] -> [rows, m]``.

    Args:
        offsets: int32 ``[E]``, where each expert's rows end; the last is the number of rows.

    Returns:
        In x's dtype, which is that of the matrices (the autocast dtype under autocast).
    """
    product: Tensor = _GroupedMM.apply(*_cast(x, matrices), offsets)
    return product


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, matrices, offsets)
        return _rows_times(x, matrices, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, matrices, offsets = ctx.saved_tensors
        need_x, need_matrices, _ = ctx.needs_input_grad
        dx = _rows_times(grad, matrices.mT, offsets) if need_x else None
        return dx, _rows_by_rows(x, grad, offsets) if need_matrices else None, None


def _rows_times(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """``x [rows, k], matrices [E, k, m] -> [rows, m]``."""
    if _has_kernel(x, matrices.shape[2]):
        return F.grouped_mm(x.contiguous(), matrices, offs=offsets)
    parts = zip(x.split(_counts(offsets)), matrices, strict=True)
    return torch.cat([rows @ matrix for rows, matrix in parts])


def _rows_by_rows(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """``x [rows, k], grad [rows, m] -> [E, k, m]``."""
    if _has_kernel(x, grad.shape[1]):
        return F.grouped_mm(x.contiguous().t(), grad.contiguous(), offs=offsets)
    counts = _counts(offsets)
    parts = zip(x.split(counts), grad.split(counts), strict=True)
    return torch.stack([rows.t() @ flow for rows, flow in parts])


def _counts(offsets: Tensor) -> list[int]:
    return offsets.diff(prepend=offsets.new_zeros(1)).tolist()


def _has_kernel(x: Tensor, columns: int) -> bool:
    """Whether torch has one product for all experts, of this dtype and these sizes."""
    if torch.__version__ < "2.11":  # before, addresses had to be multiples of 16 bytes as well
        return False
    if x.shape[1] * x.itemsize % 16 or columns * x.itemsize % 16:
        return False
    if x.is_cuda:
        is_new = torch.cuda.get_device_capability(x.device) >= (8, 0)
        return is_new and x.dtype == torch.bfloat16
    # Inductor knows no other.
    known = (torch.bfloat16,) if is_compiling() else (torch.bfloat16, torch.float16, torch.float32)
    return x.device.type == "cpu" and x.dtype in known


def grouped_linear(
    x: Tensor, cores: Sequence[Tensor], offsets: Tensor, out_features: int
) -> Tensor:
    """Each expert's rows times the ``W [in, out]`` of its chain, which is never formed whole.

    Neighbouring cores are merged, and the parts applied from the left or the right, as takes the
    fewest multiply-adds; each product is one of :func:`grouped_mm`.

    Args:
        x: ``[rows, in_features]``, the rows sorted by expert.
        cores: core k ``[E, D_k, i_k, j_k, D_{k+1}]``, of x's dtype and device; without E one that
            all experts share.
        offsets: int32 ``[E]``; see :func:`grouped_mm`.

    Returns:
        ``[rows, out_features]`` in x's dtype (the autocast dtype under autocast).

    Raises:
        TypeError: cores of another dtype or device than x.
    """
    x, *cores = _cast(x, *cores)
    for core in cores:
        if core.dtype != x.dtype or core.device != x.device:
            raise TypeError(
                f"expected cores like x, {x.dtype} on {x.device}, got {core.dtype} on {core.device}"
            )
    shapes = tuple((d, i, j, r) for d, i, j, r in (core.shape[-4:] for core in cores))
    split, order, steps = _plan(shapes, len(offsets), row_bucket(len(x)))
    parts = [_merged(cores[a:b]) for a, b in groups(split, len(cores))]
    state = F.pad(x, (0, steps[0].takes - x.shape[1]))
    for step in steps:
        rows = state.reshape(-1, step.k, step.n).transpose(1, 2).reshape(-1, step.k)
        matrices = _matrices(parts[step.part], order)
        if matrices.dim() == 2:
            product = rows @ matrices
        else:
            product = grouped_mm(rows, matrices, offsets * (step.batch * step.n))
        state = product.view(-1, step.n, step.m).transpose(1, 2)
    return state.reshape(len(x), steps[-1].gives)[:, :out_features]


def _cast(*operands: Tensor) -> list[Tensor]:
    """As autocast would above autograd, so that backward sees what forward saw."""
    kind = operands[0].device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if not casts or operands[0].dtype == torch.float64:
        return list(operands)
    return [operand.to(torch.get_autocast_dtype(kind)) for operand in operands]


def _merged(cores: Sequence[Tensor]) -> Tensor:
    """Neighbouring cores as one, with E unless all of them are shared."""
    stacked = [0 if core.dim() == 5 else None for core in cores]
    if 0 not in stacked:
        return merge_cores(cores)
    merged: Tensor = torch.vmap(lambda *each: merge_cores(each), tuple(stacked))(*cores)
    return merged


def _matrices(part: Tensor, order: str) -> Tensor:
    """A part ``[…, D, i, j, D']`` as the ``[…, k, m]`` of its step."""
    if order == "left":
        return part.flatten(-4, -3).flatten(-2)
    return part.transpose(-3, -2).flatten(-4, -3).flatten(-2).mT


@lru_cache(maxsize=1024)
def _plan(
    shapes: tuple[CoreShape, ...], experts: int, rows: int
) -> tuple[tuple[int, ...], str, list[Step]]:
    """Where to cut the chain into parts, from which end to apply them, and the products of that."""
    n, plans = len(shapes), []
    for cuts in range(2 ** (n - 1)):
        split = tuple(k for k in range(1, n) if cuts >> (k - 1) & 1)
        if parts := merged_parts(shapes, split):
            merging = sum(work.macs for work in merge_work(shapes, split, 0, None))
            for order in ("left", "right"):
                steps = chain_steps(parts, order)
                each = sum(step.m * step.n * step.k * step.batch for step in steps)
                plans.append((experts * merging + rows * each, split, order, steps))
    return min(plans, key=lambda plan: plan[0])[1:]
