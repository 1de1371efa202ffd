"""The chain: merged parts applied to x one after the other, in blocks of rows.

Each product lands where the next one reads it, so no state is ever permuted; ``plan.steps`` gives
their order and sizes. Backward recomputes the states of a block from x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_kernels.backends.torch.merging import add_product, merge, unmerge
from mpo_kernels.planning.plan import Gradients, Plan, Step, groups
from mpo_kernels.planning.work import folds


def _matrix(part: Tensor, order: str) -> Tensor:
    """A part as the ``A [m, k]`` of its step."""
    d, i, j, r = part.shape
    if order == "left":
        return part.reshape(d * i, j * r).t()
    # i and j change places; where one of them is 1, nothing moves.
    return (part.transpose(1, 2) if i > 1 < j else part).reshape(d * j, i * r)


def _matrices(parts: Sequence[Tensor], plan: Plan) -> list[Tensor]:
    """Each step's ``A [m, k]``, in the order of ``plan.steps``."""
    return [_matrix(parts[step.part], plan.order) for step in plan.steps]


def _ready(
    matrices: Sequence[Tensor], steps: Sequence[Step], rows: int, limit: int
) -> list[Tensor]:
    """The matrices as batched products read them best: not transposed, unless too large to copy."""
    return [
        matrix.contiguous()
        if step.n > 1 and rows * step.batch > 1 and matrix.numel() <= limit
        else matrix
        for matrix, step in zip(matrices, steps, strict=True)
    ]


def _apply(
    matrix: Tensor, state: Tensor, n: int, out: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """``A [m, k] × state [batch, k, n] -> [batch, m, n]``, each in any shape that holds it.

    ``rows`` are the state's by :func:`_rows`, where they are there already.
    """
    m, k = matrix.shape
    if n == 1:
        out = None if out is None else out.view(-1, m)
        return torch.mm(state.reshape(-1, k), matrix.t(), out=out)
    state = state.contiguous().view(-1, k, n)
    batch = state.shape[0]
    if batch == 1:
        out = None if out is None else out.view(m, n)
        return torch.mm(matrix, state.view(k, n), out=out)
    out = None if out is None else out.view(batch, m, n)
    if folds(n, matrix.nbytes):
        rows = _rows(state, k, n) if rows is None else rows
        folded = (rows @ matrix.t()).view(batch, n, m).transpose(1, 2)
        return folded.contiguous() if out is None else out.copy_(folded)
    return torch.bmm(matrix.expand(batch, m, k), state, out=out)


def _rows(state: Tensor, k: int, n: int) -> Tensor:
    """``[batch, k, n] -> [(batch n), k]``: a product of two of these sums over batch and n."""
    if n == 1:
        return state.reshape(-1, k)
    return state.reshape(-1, k, n).transpose(1, 2).reshape(-1, k)


def _padded(block: Tensor, features: int) -> Tensor:
    """Rows zero-padded to the product of the factors, which they mostly have."""
    if block.shape[1] == features:
        return block
    return F.pad(block, (0, features - block.shape[1]))


def _forward(
    x: Tensor, matrices: Sequence[Tensor], steps: Sequence[Step], bias: Tensor | None, y: Tensor
) -> None:
    """Write y for a block of rows of x."""
    state, last = _padded(x, steps[0].takes), steps[-1]
    for step, matrix in zip(steps[:-1], matrices[:-1], strict=True):
        state = _apply(matrix, state, step.n)
    if y.shape[1] != last.gives:
        product = _apply(matrices[-1], state, last.n).view(y.shape[0], -1)[:, : y.shape[1]]
        if bias is None:
            y.copy_(product)
        else:
            torch.add(product, bias, out=y)
    elif bias is not None and last.batch == last.n == 1:
        # One GEMM, which adds the bias in passing.
        torch.addmm(bias, state.reshape(-1, last.k), matrices[-1].t(), out=y)
    else:
        _apply(matrices[-1], state, last.n, y)
        if bias is not None:
            y.add_(bias)


def forward(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, y: Tensor, plan: Plan) -> None:
    """Write ``y [rows, out]`` of ``x [rows, in]``."""
    steps, rows = plan.steps, min(plan.block, x.shape[0])
    limit = steps[0].takes * steps[-1].gives // 2
    matrices = _ready(_matrices(merge(cores, plan.split), plan), steps, rows, limit)
    # Splitting costs the host as much as a product.
    blocks = [(x, y)] if rows == x.shape[0] else zip(x.split(rows), y.split(rows), strict=True)
    for x_block, y_block in blocks:
        _forward(x_block, matrices, steps, bias, y_block)


def plain(x: Tensor, cores: Sequence[Tensor], out_features: int, plan: Plan) -> Tensor:
    """``x · W [rows, out_features]`` with nothing written in place, whatever the rows."""
    state = _padded(x, plan.steps[0].takes)
    matrices = _matrices(merge(cores, plan.split), plan)
    for step, matrix in zip(plan.steps, matrices, strict=True):
        state = _apply(matrix, state, step.n)
    return state.reshape(x.shape[0], -1)[:, :out_features]


def backward(
    grad: Tensor, x: Tensor, cores: Sequence[Tensor], gradients: Gradients, plan: Plan
) -> tuple[Tensor | None, list[Tensor | None]]:
    """``dx`` and the cores' gradients, ``None`` where not asked for."""
    parts = merge(cores, plan.split)
    steps, matrices = plan.steps, _matrices(parts, plan)
    left = plan.order == "left"
    needs = [any(gradients.cores[a:b]) for a, b in groups(plan.split, len(cores))]
    # In the layout of the part: [(D i), (j D')] from the left, [(D j), (i D')] from the right.
    sums: list[Tensor | None] = [None] * len(parts)
    features, out_features = steps[0].takes, steps[-1].gives
    limit, size = features * out_features // 2, min(plan.block, x.shape[0])
    # Products below the first one that anything is asked of are not formed.
    asked = [i for i, step in enumerate(steps) if needs[step.part]]
    last = 0 if gradients.x else min(asked)
    # Nor are states behind the last one that a gradient is made of.
    before_asked = max(asked, default=0)
    turned = _ready([matrix.t() for matrix in matrices], steps, size, limit)
    matrices = _ready(matrices[:before_asked], steps[:before_asked], size, limit)
    dx = x.new_empty(x.shape) if gradients.x else None
    for start in range(0, x.shape[0], plan.block):
        rows = slice(start, start + plan.block)
        states = [_padded(x[rows], features)]
        for step, matrix in zip(steps[:before_asked], matrices, strict=True):
            states.append(_apply(matrix, states[-1], step.n))
        flow = _padded(grad[rows], out_features)
        for index in range(len(steps) - 1, last - 1, -1):
            step, after = steps[index], None
            if needs[step.part]:
                before, after = _rows(states[index], step.k, step.n), _rows(flow, step.m, step.n)
                pair = (before.t(), after) if left else (after.t(), before)
                sums[step.part] = add_product(sums[step.part], *pair)
            if index > last:
                flow = _apply(turned[index], flow, step.n, rows=after)
        if dx is not None and x.shape[1] == features:
            _apply(turned[0], flow, steps[0].n, dx[rows], after)
        elif dx is not None:
            product = _apply(turned[0], flow, steps[0].n, rows=after)
            dx[rows] = product.view(-1, features)[:, : x.shape[1]]
    for k, total in enumerate(sums):
        if total is not None:
            d, i, j, r = parts[k].shape
            sums[k] = total.view(d, i, j, r) if left else total.view(d, j, i, r).transpose(1, 2)
    return dx, unmerge(cores, plan.split, sums, gradients.cores)
