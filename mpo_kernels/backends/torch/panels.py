"""Streamed panels: a few columns of W at a time, formed from the parts and used by one GEMM.

A panel takes some j of the first part, A_p · B · C …, multiplied from the left: over all panels no
product is repeated, and the columns of y it stands for are contiguous. Backward forms each panel
again and takes its gradient apart before the next one: W and dW never exist whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mpo_kernels.backends.torch.merging import add_product, merge, unmerge
from mpo_kernels.planning.plan import Gradients, Plan, groups


def _panels(
    parts: Sequence[Tensor], block: int, out_features: int
) -> Iterator[tuple[slice, slice]]:
    """The j of the first part in each panel, and the true columns of y they stand for."""
    leading = parts[0].shape[2]
    width = math.prod(part.shape[2] for part in parts[1:])
    for start in range(0, leading, block):
        stop = min(start + block, leading)
        if start * width < out_features:
            yield slice(start, stop), slice(start * width, min(stop * width, out_features))


def _products(parts: Sequence[Tensor], block: slice) -> list[Tensor]:
    """A_p, A_p · B, A_p · B · C, …: product k is ``[(i_A p i_B j_B …), D_k]``."""
    product = parts[0][:, :, block].reshape(-1, parts[0].shape[3])
    products = [product]
    for part in parts[1:]:
        product = (product @ part.reshape(part.shape[0], -1)).view(-1, part.shape[3])
        products.append(product)
    return products


def _interleaved_sizes(parts: Sequence[Tensor], block: slice) -> list[int]:
    """``i_A, p, i_B, j_B, …``"""
    sizes = [size for part in parts for size in part.shape[1:3]]
    sizes[1] = block.stop - block.start
    return sizes


def _to_matrix(product: Tensor, parts: Sequence[Tensor], block: slice) -> Tensor:
    """The panel ``[(i_A i_B …), (p j_B …)]`` of the last product."""
    n = len(parts)
    interleaved = product.view(_interleaved_sizes(parts, block))
    rows = math.prod(part.shape[1] for part in parts)
    return interleaved.permute(*range(0, 2 * n, 2), *range(1, 2 * n, 2)).reshape(rows, -1)


def _from_matrix(panel: Tensor, parts: Sequence[Tensor], block: slice) -> Tensor:
    """The reverse of :func:`_to_matrix`: ``[(i_A p i_B j_B …), 1]``."""
    n = len(parts)
    sizes = _interleaved_sizes(parts, block)
    axes = [axis for k in range(n) for axis in (k, n + k)]
    return panel.view(sizes[::2] + sizes[1::2]).permute(axes).reshape(-1, 1)


def forward(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, y: Tensor, plan: Plan) -> None:
    """Write ``y [rows, out]`` of ``x [rows, in]``."""
    parts = merge(cores, plan.split)
    if bias is not None:
        _spread(bias, y)
    for block, columns in _panels(parts, plan.block, y.shape[1]):
        panel = _to_matrix(_products(parts, block)[-1], parts, block)
        panel = panel[: x.shape[1], : columns.stop - columns.start]
        if bias is None:
            torch.mm(x, panel, out=y[:, columns])
        else:
            y[:, columns].addmm_(x, panel)


def _spread(bias: Tensor, y: Tensor) -> None:
    """Every row of y is the bias: what a GEMM adds to, since none adds a vector to some columns."""
    aligned = bias.is_contiguous() and bias.data_ptr() % 8 == 0 == bias.nbytes % 8
    if y.is_cuda and aligned:
        # There a copy to many rows is as fast as its elements are wide.
        y, bias = y.view(torch.int64), bias.view(torch.int64)
    y.copy_(bias)


def plain(x: Tensor, cores: Sequence[Tensor], out_features: int, plan: Plan) -> Tensor:
    """``x · W [rows, out_features]`` with nothing written in place, whatever the rows."""
    parts, products = merge(cores, plan.split), []
    for block, columns in _panels(parts, plan.block, out_features):
        panel = _to_matrix(_products(parts, block)[-1], parts, block)
        products.append(x @ panel[: x.shape[1], : columns.stop - columns.start])
    return torch.cat(products, 1)


def backward(
    grad: Tensor, x: Tensor, cores: Sequence[Tensor], gradients: Gradients, plan: Plan
) -> tuple[Tensor | None, list[Tensor | None]]:
    """``dx`` and the cores' gradients, ``None`` where not asked for."""
    parts = merge(cores, plan.split)
    needs = [any(gradients.cores[a:b]) for a, b in groups(plan.split, len(cores))]
    sums: list[Tensor | None] = [None] * len(parts)
    if needs[0]:
        # Written panel by panel; the j that are all padding keep their zero.
        sums[0] = torch.zeros_like(parts[0], dtype=torch.promote_types(x.dtype, torch.float32))
    dx = None
    for block, columns in _panels(parts, plan.block, grad.shape[1]):
        products, dy = _products(parts, block), grad[:, columns]
        panel = _to_matrix(products[-1], parts, block)
        if gradients.x:
            dx = add_product(dx, dy, panel[: x.shape[1], : dy.shape[1]].t())
        if any(needs):
            # In place of the panel; what is padded has no gradient.
            if panel.shape != (x.shape[1], dy.shape[1]):
                panel.zero_()
            torch.mm(x.t(), dy, out=panel[: x.shape[1], : dy.shape[1]])
            flow = _from_matrix(panel, parts, block)
            _project(flow, parts, products, block, needs, sums)
    return None if dx is None else dx.to(x.dtype), unmerge(cores, plan.split, sums, gradients.cores)


def _project(
    flow: Tensor,
    parts: Sequence[Tensor],
    products: Sequence[Tensor],
    block: slice,
    needs: Sequence[bool],
    sums: list[Tensor | None],
) -> None:
    """Add to the parts' gradients from that of a panel, last part first."""
    for k in range(len(parts) - 1, 0, -1):
        part = parts[k].reshape(parts[k].shape[0], -1)
        flow = flow.view(-1, part.shape[1])
        if needs[k]:
            sums[k] = add_product(sums[k], products[k - 1].t(), flow)
        if not any(needs[:k]):
            return
        flow = flow @ part.t()
    if sums[0] is not None:
        of_block = sums[0][:, :, block]
        of_block.copy_(flow.view(of_block.shape))
