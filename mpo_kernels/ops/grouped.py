"""Rows sorted by expert times the matrices of their experts, dense or held as chains of cores.

Where torch has one product for all experts that does not wait for the host (`grouped_mm` on a GPU,
or while a graph is compiled), each step of a chain is one; else each expert's rows are a layer's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from mpo_kernels.cores.chain import merge_cores
from mpo_kernels.ops.functional import linear
from mpo_kernels.planning.candidates import chain_steps
from mpo_kernels.planning.plan import CoreShape, groups, merged_parts, row_bucket
from mpo_kernels.planning.work import merge_work

_MANY = 4096


def grouped_mm(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """Each expert's rows times its matrix: ``x [rows, k], matrices [E, k, m] -> [rows, m]``.

    Args:
        offsets: int32 ``[E]``, where each expert's rows end; the last is the number of rows.

    Returns:
        In x's dtype, which is that of the matrices (the autocast dtype under autocast).
    """
    x, matrices = _cast(x, matrices)
    if _has_kernel(x, matrices.shape[1:]):
        return _product(x, matrices, offsets)
    return _by_expert(torch.mm, x, [matrices], offsets)


def grouped_linear(
    x: Tensor, cores: Sequence[Tensor], offsets: Tensor, out_features: int
) -> Tensor:
    """Each expert's rows times the ``W [in, out]`` of its chain, which is never formed whole.

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
    # A graph is for any number of rows.
    plan = _plan(shapes, len(offsets), _MANY if is_compiling() else row_bucket(len(x)))
    sizes = [size for _, m, _, k, _ in plan.steps for size in (k, m)]
    if not _has_kernel(x, sizes) or not (plan.is_cheap or is_compiling()):
        return _by_expert(
            lambda rows, *each: linear(rows, list(each), None, out_features), x, cores, offsets
        )
    parts = [_merged(cores[a:b]) for a, b in groups(plan.split, len(cores))]
    state = F.pad(x, (0, math.prod([i for _, i, _, _ in shapes]) - x.shape[1]))
    for part, m, n, k, batch in plan.steps:
        rows = state.reshape(-1, k, n).transpose(1, 2).reshape(-1, k)
        matrices = _matrices(parts[part], plan.order)
        if matrices.dim() == 2:
            product = rows @ matrices
        else:
            product = _product(rows, matrices, offsets * (batch * n))
        state = product.view(-1, n, m).transpose(1, 2)
    return state.reshape(len(x), math.prod([j for _, _, j, _ in shapes]))[:, :out_features]


def _cast(*operands: Tensor) -> list[Tensor]:
    """As autocast would above autograd, so that backward sees what forward saw."""
    kind = operands[0].device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if not casts or operands[0].dtype == torch.float64:
        return list(operands)
    return [operand.to(torch.get_autocast_dtype(kind)) for operand in operands]


def _has_kernel(x: Tensor, sizes: Sequence[int]) -> bool:
    """Whether torch has products for all experts, of this dtype and these sizes, that pay."""
    if torch.__version__ < "2.11":  # before, addresses had to be multiples of 16 bytes as well
        return False
    if x.dtype != torch.bfloat16 or any(size * x.itemsize % 16 for size in sizes):
        return False
    if x.is_cuda:
        return torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.device.type == "cpu" and is_compiling()  # a CPU's is a loop too


def _by_expert(
    product: Callable[..., Tensor], x: Tensor, operands: Sequence[Tensor], offsets: Tensor
) -> Tensor:
    """``product`` of each expert's rows and its part of ``operands [E, …]``; shared without E."""
    counts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    rows = x.split(counts)
    of_each = [
        operand.unbind() if operand.dim() != 4 else [operand] * len(counts) for operand in operands
    ]
    # A graph does not know who has rows; where nobody has, one is asked for the gradients' sake.
    used = [k for k, count in enumerate(counts) if is_compiling() or count] or [0]
    return torch.cat([product(rows[k], *(each[k] for each in of_each)) for k in used])


def _product(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    product: Tensor = _GroupedMM.apply(x, matrices, offsets)
    return product


class _GroupedMM(torch.autograd.Function):
    """Torch's own backward refuses gradients of any strides, such as those of a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, matrices, offsets)
        return F.grouped_mm(x.contiguous(), matrices, offs=offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, matrices, offsets = ctx.saved_tensors
        need_x, need_matrices, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        dx = F.grouped_mm(grad, matrices.mT, offs=offsets) if need_x else None
        if not need_matrices:
            return dx, None, None
        return dx, F.grouped_mm(x.contiguous().t(), grad, offs=offsets), None


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


class _Plan(NamedTuple):
    """Where a chain is cut into parts, from which end they are applied, and by what products."""

    macs: int
    split: tuple[int, ...]
    order: str
    steps: tuple[tuple[int, ...], ...]  # those of `planning.plan.Step`, which Dynamo does not take
    is_cheap: bool  # no dearer than dense matrices


@torch.compiler.assume_constant_result
def _plan(shapes: tuple[CoreShape, ...], experts: int, rows: int) -> _Plan:
    """The fewest multiply-adds for so many rows of all experts together."""
    return _least(shapes, experts, rows)


@lru_cache(maxsize=1024)
def _least(shapes: tuple[CoreShape, ...], experts: int, rows: int) -> _Plan:
    n, plans = len(shapes), []
    for cuts in range(2 ** (n - 1)):
        split = tuple(k for k in range(1, n) if cuts >> (k - 1) & 1)
        if parts := merged_parts(shapes, split):
            merging = sum(work.macs for work in merge_work(shapes, split, 0, None))
            for order in ("left", "right"):
                steps = chain_steps(parts, order)
                each = sum(step.m * step.n * step.k * step.batch for step in steps)
                macs = experts * merging + rows * each
                dense = rows * steps[0].takes * steps[-1].gives
                products = tuple(astuple(step) for step in steps)
                plans.append(_Plan(macs, split, order, products, macs <= dense))
    return min(plans, key=lambda plan: plan.macs)
