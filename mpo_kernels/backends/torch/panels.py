"""Streamed panels: L · C · R formed for a few values of j_c at a time, and used by one GEMM.

Backward forms each panel again, and takes the gradient of a panel apart before the next one: W and
dW never exist whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mpo_kernels.backends.torch.merging import add_product, unmerge
from mpo_kernels.decompose import merge_cores
from mpo_kernels.plan import ROW_BLOCK, Gradients, Plan, groups


class _Panels:
    """L · C · R for a few values of j_c at a time.

    The columns of a panel are (j_L, j_c of the panel, j_R); those of y that they stand for are
    contiguous where j_L is 1, and strided by j_c otherwise.
    """

    def __init__(self, cores: Sequence[Tensor], plan: Plan) -> None:
        centre = plan.split[0]
        self.left = merge_cores(cores[:centre]) if centre else None
        self.centre = cores[centre]
        self.right = merge_cores(cores[centre + 1 :]) if centre + 1 < len(cores) else None
        self.order, self.block = plan.order, plan.block
        self.dl, self.ic, self.jc, self.dr = self.centre.shape
        self.il, self.jl = (1, 1) if self.left is None else self.left.shape[1:3]
        self.ir, self.jr = (1, 1) if self.right is None else self.right.shape[1:3]
        self.l = None if self.left is None else self.left.reshape(-1, self.dl)
        self.r = None if self.right is None else self.right.reshape(self.dr, -1)

    def ranges(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.jc, self.block):
            yield start, min(start + self.block, self.jc)

    def centre_slice(self, start: int, stop: int) -> Tensor:
        """C_p as ``[D_l, i_c, p, D_r]``, contiguous."""
        return self.centre[:, :, start:stop].contiguous()

    def form(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """The panel ``[(i_L i_c i_R), (j_L p j_R)]``, and the product it was formed from."""
        p = c.shape[2]
        if self.order == "CR":
            inner = c.view(-1, self.dr) if self.r is None else c.view(-1, self.dr) @ self.r
            inner = inner.view(self.dl, -1)
            w = inner if self.l is None else self.l @ inner
        else:
            inner = c.view(self.dl, -1) if self.l is None else self.l @ c.view(self.dl, -1)
            inner = inner.view(-1, self.dr)
            w = inner if self.r is None else inner @ self.r
        w = w.view(self.il, self.jl, self.ic, p, self.ir, self.jr).permute(0, 2, 4, 1, 3, 5)
        return w.reshape(self.il * self.ic * self.ir, -1), inner

    def project(self, g: Tensor, c: Tensor, inner: Tensor, sums: list[Tensor | None]) -> None:
        """Add to L's and R's gradient, and set C_p's, from ``g``, the gradient of a panel."""
        p = c.shape[2]
        g = g.view(self.il, self.ic, self.ir, self.jl, p, self.jr).permute(0, 3, 1, 4, 2, 5)
        dl, dc, dr = sums
        if self.order == "CR":
            g = g.reshape(self.il * self.jl, -1)
            if dl is not None:
                add_product(dl, g, inner.t())
            if dc is None and dr is None:
                return
            lg = (g if self.l is None else self.l.t() @ g).view(self.dl * self.ic * p, -1)
            if dr is not None:
                add_product(dr, c.view(-1, self.dr).t(), lg)
            if dc is not None:
                dc.copy_((lg if self.r is None else lg @ self.r.t()).view(c.shape))
        else:
            g = g.reshape(-1, self.ir * self.jr)
            if dr is not None:
                add_product(dr, inner.t(), g)
            if dc is None and dl is None:
                return
            gr = (g if self.r is None else g @ self.r.t()).view(self.il * self.jl, -1)
            if dl is not None:
                add_product(dl, gr, c.view(self.dl, -1).t())
            if dc is not None:
                dc.copy_((gr if self.l is None else self.l.t() @ gr).view(c.shape))

    def columns(self, y: Tensor, start: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
        """The columns of ``y [rows, out]`` that a panel stands for: j_L, and a view for them.

        Each view is ``[rows, count of j_L, up to p · j_R]``; padding can cut the last j_L short.
        """
        width, first, last = self.jc * self.jr, start * self.jr, stop * self.jr
        whole, rest = divmod(y.shape[1], width)
        if whole:
            yield (
                slice(0, whole),
                y[:, : whole * width].unflatten(1, (whole, width))[:, :, first:last],
            )
        if rest > first:
            cut = y[:, whole * width + first : whole * width + min(rest, last)]
            yield slice(whole, whole + 1), cut.unsqueeze(1)

    def gather(self, grad: Tensor, start: int, stop: int) -> Tensor:
        """The columns of ``grad`` for a panel, ``[rows, (j_L p j_R)]``, zero where padded."""
        views = list(self.columns(grad, start, stop))
        shape = (grad.shape[0], self.jl, (stop - start) * self.jr)
        if self.jl == 1 and views and views[0][1].shape == shape:
            return views[0][1].squeeze(1)
        padded = self.jl * self.jc * self.jr > grad.shape[1]
        gathered = grad.new_zeros(shape) if padded else grad.new_empty(shape)
        for j, view in views:
            gathered[:, j, : view.shape[2]] = view
        return gathered.view(shape[0], -1)


def forward(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, y: Tensor, plan: Plan) -> None:
    panels = _Panels(cores, plan)
    for start, stop in panels.ranges():
        w, _ = panels.form(panels.centre_slice(start, stop))
        w = w[: x.shape[1]]
        biases = (
            [None, None]
            if bias is None
            else [b for _, b in panels.columns(bias[None], start, stop)]
        )
        if panels.jl == 1:
            for (_, view), b in zip(panels.columns(y, start, stop), biases, strict=False):
                columns = view.squeeze(1)
                w = w[:, : columns.shape[1]]
                if b is None:
                    torch.mm(x, w, out=columns)
                else:
                    torch.addmm(b.view(-1), x, w, out=columns)
            continue
        # Blocks of rows, so that what is scattered into y is still in cache.
        for first in range(0, x.shape[0], ROW_BLOCK):
            rows = slice(first, first + ROW_BLOCK)
            product = (x[rows] @ w).view(-1, panels.jl, (stop - start) * panels.jr)
            for (j, view), b in zip(panels.columns(y[rows], start, stop), biases, strict=False):
                values = product[:, j, : view.shape[2]]
                view.copy_(values) if b is None else torch.add(values, b, out=view)


def backward(
    grad: Tensor, x: Tensor, cores: Sequence[Tensor], gradients: Gradients, plan: Plan
) -> tuple[Tensor | None, list[Tensor | None]]:
    panels = _Panels(cores, plan)
    needs = [any(gradients.cores[a:b]) for a, b in groups(plan.split, len(cores))]
    accumulate = torch.promote_types(x.dtype, torch.float32)
    sums = [
        torch.zeros_like(part, dtype=accumulate) if need and part is not None else None
        for part, need in zip((panels.l, panels.centre, panels.r), needs, strict=True)
    ]
    dx = torch.empty(x.shape, dtype=accumulate, device=x.device) if gradients.x else None
    padding = panels.il * panels.ic * panels.ir - x.shape[1]
    for start, stop in panels.ranges():
        c = panels.centre_slice(start, stop)
        w, inner = panels.form(c)
        d = panels.gather(grad, start, stop)
        if dx is not None:
            w = w[: x.shape[1]].t()
            if dx.dtype == d.dtype:
                dx.addmm_(d, w, beta=1 if start else 0)
            else:
                dx = dx + d @ w if start else (d @ w).to(accumulate)
        if any(needs):
            del w
            g = x.t() @ d
            if padding:
                g = torch.nn.functional.pad(g, (0, 0, 0, padding))
            of_slice = None if sums[1] is None else sums[1][:, :, start:stop]
            panels.project(g, c, inner, [sums[0], of_slice, sums[2]])
    part_grads = [
        total.view(part.shape) if total is not None and part is not None else None
        for total, part in zip(sums, (panels.left, panels.centre, panels.right), strict=True)
    ]
    dx = None if dx is None else dx.to(x.dtype)
    return dx, unmerge(cores, plan, part_grads, gradients)
