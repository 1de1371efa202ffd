"""The chain: merged parts applied to x one after the other, in blocks of rows.

Each product lands where the next one reads it, so no state is ever permuted; ``plan.steps`` gives
their order and sizes. Backward recomputes the states of a block from x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpo_kernels.backends.torch.merging import add_product, merge, unmerge
from mpo_kernels.plan import Gradients, Plan, Step, folds, groups


def _matrices(parts: Sequence[Tensor], order: str) -> list[Tensor]:
    """Each step's ``A [m, k]``, in the order of ``plan.steps``."""
    if order == "left":
        return [part.reshape(-1, math.prod(part.shape[2:])).t() for part in parts]
    return [
        part.transpose(1, 2).reshape(part.shape[0] * part.shape[2], -1) for part in reversed(parts)
    ]


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


def _apply(matrix: Tensor, state: Tensor, out: Tensor | None = None) -> Tensor:
    """``A [m, k] × state [batch, k, n] -> [batch, m, n]``."""
    batch, k, n = state.shape
    m = matrix.shape[0]
    if n == 1:
        out = None if out is None else out.view(batch, m)
        return torch.mm(state.view(batch, k), matrix.t(), out=out).view(batch, m, 1)
    if batch == 1:
        out = None if out is None else out.view(m, n)
        return torch.mm(matrix, state.view(k, n), out=out).view(1, m, n)
    if folds(n, matrix.nbytes):
        folded = state.transpose(1, 2).reshape(batch * n, k) @ matrix.t()
        folded = folded.view(batch, n, m).transpose(1, 2)
        return folded.contiguous() if out is None else out.copy_(folded)
    return torch.bmm(matrix.expand(batch, m, k), state, out=out)


def _rows(state: Tensor) -> Tensor:
    """``[batch, m, n] -> [(batch n), m]``: a product of two of these sums over batch and n."""
    return state.transpose(1, 2).reshape(-1, state.shape[1])


def _padded(block: Tensor, features: int) -> Tensor:
    """A contiguous block of rows, zero-padded to the product of the factors."""
    if block.shape[1] == features:
        return block.contiguous()
    padded = block.new_zeros(block.shape[0], features)
    padded[:, : block.shape[1]] = block
    return padded


def forward(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, y: Tensor, plan: Plan) -> None:
    parts = merge(cores, plan.split)
    features, out_features = (math.prod(core.shape[axis] for core in cores) for axis in (1, 2))
    exact = y.shape[1] == out_features
    steps = plan.steps
    rows = min(plan.block, x.shape[0])
    limit = features * out_features // 2
    matrices = _ready(_matrices(parts, plan.order), steps, rows, limit)
    for x_block, y_block in zip(x.split(plan.block), y.split(plan.block), strict=True):
        state = _padded(x_block, features)
        for step, matrix in zip(steps, matrices, strict=True):
            last = step is steps[-1] and exact
            out = y_block.view(-1, step.m, step.n) if last else None
            state = _apply(matrix, state.view(-1, step.k, step.n), out)
        if not exact:
            y_block.copy_(state.view(len(x_block), -1)[:, : y.shape[1]])
        if bias is not None:
            y_block.add_(bias)


def plain(x: Tensor, cores: Sequence[Tensor], out_features: int, plan: Plan) -> Tensor:
    """``x · W [rows, out_features]`` with nothing written in place, whatever the rows."""
    features = math.prod(core.shape[1] for core in cores)
    state = torch.nn.functional.pad(x, (0, features - x.shape[1]))
    matrices = _matrices(merge(cores, plan.split), plan.order)
    for step, matrix in zip(plan.steps, matrices, strict=True):
        state = _apply(matrix, state.reshape(-1, step.k, step.n))
    return state.reshape(x.shape[0], -1)[:, :out_features]


def backward(
    grad: Tensor, x: Tensor, cores: Sequence[Tensor], gradients: Gradients, plan: Plan
) -> tuple[Tensor | None, list[Tensor | None]]:
    parts = merge(cores, plan.split)
    steps, matrices = plan.steps, _matrices(parts, plan.order)
    left = plan.order == "left"
    needs = [any(gradients.cores[a:b]) for a, b in groups(plan.split, len(cores))]
    # In the layout of the part: [(D i), (j D')] from the left, [(D j), (i D')] from the right.
    sums: list[Tensor | None] = [None] * len(parts)
    features, out_features = (math.prod(core.shape[axis] for core in cores) for axis in (1, 2))
    limit, size = features * out_features // 2, min(plan.block, x.shape[0])
    turned = _ready([matrix.t() for matrix in matrices], steps, size, limit)
    matrices = _ready(matrices[:-1], steps[:-1], size, limit)
    # Products below the first one that anything is asked of are not formed.
    last = 0 if gradients.x else min(i for i, step in enumerate(steps) if needs[step.part])
    several = gradients.x and x.shape[0] > plan.block
    dx = x.new_empty(x.shape) if several else None
    for start in range(0, x.shape[0], plan.block):
        rows = slice(start, start + plan.block)
        states = [_padded(x[rows], features)]
        for step, matrix in zip(steps[:-1], matrices, strict=True):
            states.append(_apply(matrix, states[-1].view(-1, step.k, step.n)))
        flow = _padded(grad[rows], out_features)
        for index in range(len(steps) - 1, last - 1, -1):
            step = steps[index]
            flow = flow.view(-1, step.m, step.n)
            if needs[step.part]:
                before, after = _rows(states[index].view(-1, step.k, step.n)), _rows(flow)
                pair = (before.t(), after) if left else (after.t(), before)
                sums[step.part] = add_product(sums[step.part], *pair)
            if index > last or gradients.x:
                flow = _apply(turned[index], flow)
        if gradients.x:
            of_rows = flow.view(-1, features)[:, : x.shape[1]]
            if dx is None:
                dx = of_rows.contiguous()
            else:
                dx[rows] = of_rows
    for k, total in enumerate(sums):
        if total is not None:
            d, i, j, r = parts[k].shape
            sums[k] = total.view(d, i, j, r) if left else total.view(d, j, i, r).transpose(1, 2)
    return dx, unmerge(cores, plan.split, sums, gradients.cores)
