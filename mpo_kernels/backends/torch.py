"""The torch back end: both contractions in library GEMMs, on any device and in any dtype.

Every function takes ``x [rows, in]`` and cores, never the dense weight: a chain applies merged
groups of cores to x in blocks of rows, panels form L · C · R for a few j_c at a time. Backward
recomputes what it needs from x and the cores. See ``mpo_kernels/plan.py`` for the costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mpo_kernels.decompose import merge_cores
from mpo_kernels.plan import (
    ROW_BLOCK,
    CoreShapes,
    Gradients,
    Plan,
    device_figures,
    folds,
    groups,
    plan_linear,
)


def plan_for(
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    cores: Sequence[Tensor],
    gradients: Gradients | None = None,
) -> Plan:
    """The plan for ``x [rows, in]``, forward or (with ``gradients``) backward."""
    figures = device_figures(device.type, dtype, torch.get_num_threads())
    return plan_linear(_shapes(cores), rows, dtype, figures, gradients)


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
    forward = _chain if plan.algorithm == "chain" else _panels
    forward(x, cores, bias, y, plan)
    return y


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
    backward = _chain_backward if plan.algorithm == "chain" else _panels_backward
    return backward(grad, x, cores, gradients, plan)


def _shapes(cores: Sequence[Tensor]) -> CoreShapes:
    return [(d, i, j, r) for d, i, j, r in (core.shape for core in cores)]


# --- merging cores -------------------------------------------------------------------------------


def _merge(cores: Sequence[Tensor], plan: Plan) -> list[Tensor]:
    """The parts between the cuts of the plan."""
    return [merge_cores(cores[a:b]) for a, b in groups(plan.split, len(cores))]


def _unmerge(
    cores: Sequence[Tensor], plan: Plan, grads: Sequence[Tensor | None], gradients: Gradients
) -> list[Tensor | None]:
    """Gradients of the cores from those of the merged parts."""
    result: list[Tensor | None] = []
    for (a, b), grad in zip(groups(plan.split, len(cores)), grads, strict=True):
        result += _merge_backward(cores[a:b], grad, gradients.cores[a:b])
    return [
        None if grad is None else grad.to(core.dtype).contiguous()
        for grad, core in zip(result, cores, strict=True)
    ]


def _merge_backward(
    cores: Sequence[Tensor], grad: Tensor | None, needs: Sequence[bool]
) -> list[Tensor | None]:
    grads: list[Tensor | None] = [None] * len(cores)
    if grad is None or not any(needs):
        return grads
    lefts = [cores[0]]
    for k in range(1, len(cores) - 1):
        lefts.append(merge_cores([lefts[-1], cores[k]]))
    for k in range(len(cores) - 1, 0, -1):
        left, core = lefts[k - 1], cores[k].to(grad.dtype)
        d, i, j, _ = left.shape
        _, ik, jk, rk = core.shape
        split = grad.view(d, i, ik, j, jk, rk)
        if needs[k]:
            grads[k] = torch.tensordot(left.to(grad.dtype), split, dims=([0, 1, 2], [0, 1, 3]))
        if not any(needs[:k]):
            return grads
        grad = torch.tensordot(split, core, dims=([2, 4, 5], [1, 2, 3]))
    grads[0] = grad
    return grads


# --- chain ---------------------------------------------------------------------------------------


def _chain_matrices(parts: Sequence[Tensor], order: str) -> list[Tensor]:
    """Each step's ``A [m, k]``, in the order of ``plan.steps``."""
    if order == "left":
        return [part.reshape(-1, math.prod(part.shape[2:])).t() for part in parts]
    return [
        part.transpose(1, 2).reshape(part.shape[0] * part.shape[2], -1) for part in reversed(parts)
    ]


def _apply(matrix: Tensor, state: Tensor, out: Tensor | None = None) -> Tensor:
    """``A [m, k] × state [batch, k, n] -> [batch, m, n]``."""
    batch, k, n = state.shape
    m = matrix.shape[0]
    if n == 1:
        out = None if out is None else out.view(batch, m)
        return torch.mm(state.view(batch, k), matrix.t(), out=out).view(batch, m, 1)
    if folds(n, matrix.nbytes):
        folded = state.transpose(1, 2).reshape(batch * n, k) @ matrix.t()
        folded = folded.view(batch, n, m).transpose(1, 2)
        return folded.contiguous() if out is None else out.copy_(folded)
    return torch.bmm(matrix.expand(batch, m, k), state, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total [m, n] += a [m, k] × b [k, n]``, where ``total`` may be of a wider dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _reduce(a: Tensor, b: Tensor, total: Tensor) -> None:
    """``total [m, k] += Σ_batch a [batch, m, n] × b [batch, k, n]ᵀ``."""
    rows_a, rows_b = (t.transpose(1, 2).reshape(-1, t.shape[1]) for t in (a, b))
    _add_product(total, rows_a.t(), rows_b)


def _padded(block: Tensor, features: int) -> Tensor:
    """A contiguous block of rows, zero-padded to the product of the factors."""
    if block.shape[1] == features:
        return block.contiguous()
    padded = block.new_zeros(block.shape[0], features)
    padded[:, : block.shape[1]] = block
    return padded


def _chain(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, y: Tensor, plan: Plan) -> None:
    parts = _merge(cores, plan)
    steps, matrices = plan.steps, _chain_matrices(parts, plan.order)
    features = math.prod(core.shape[1] for core in cores)
    exact = y.shape[1] == math.prod(core.shape[2] for core in cores)
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


def _chain_backward(
    grad: Tensor, x: Tensor, cores: Sequence[Tensor], gradients: Gradients, plan: Plan
) -> tuple[Tensor | None, list[Tensor | None]]:
    parts = _merge(cores, plan)
    steps, matrices = plan.steps, _chain_matrices(parts, plan.order)
    needs = [any(gradients.cores[a:b]) for a, b in groups(plan.split, len(cores))]
    accumulate = torch.promote_types(x.dtype, torch.float32)
    left = plan.order == "left"
    # In the layout of the part: [(D i), (j D')] from the left, [(D j), (i D')] from the right.
    sums = [
        x.new_zeros((step.k, step.m) if left else (step.m, step.k), dtype=accumulate)
        if needs[step.part]
        else None
        for step in steps
    ]
    # Products below the first one that anything is asked of are not formed.
    last = 0 if gradients.x else min(i for i, total in enumerate(sums) if total is not None)
    features = math.prod(core.shape[1] for core in cores)
    out_features = math.prod(core.shape[2] for core in cores)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if gradients.x else None
    for start in range(0, x.shape[0], plan.block):
        rows = slice(start, start + plan.block)
        states = [_padded(x[rows], features)]
        for step, matrix in zip(steps[:-1], matrices, strict=False):
            states.append(_apply(matrix, states[-1].view(-1, step.k, step.n)))
        flow = _padded(grad[rows], out_features)
        for index in range(len(steps) - 1, last - 1, -1):
            step, total = steps[index], sums[index]
            flow = flow.view(-1, step.m, step.n)
            if total is not None:
                state = states[index].view(-1, step.k, step.n)
                _reduce(*((state, flow) if left else (flow, state)), total)
            if index > last or dx is not None:
                flow = _apply(matrices[index].t(), flow)
        if dx is not None:
            dx[rows] = flow.view(-1, features)[:, : x.shape[1]]
    part_grads: list[Tensor | None] = [None] * len(parts)
    for step, total in zip(steps, sums, strict=True):
        if total is not None:
            d, i, j, r = parts[step.part].shape
            part_grads[step.part] = (
                total.view(d, i, j, r)
                if left
                else total.view(d, j, i, r).transpose(1, 2).contiguous()
            )
    return dx, _unmerge(cores, plan, part_grads, gradients)


# --- panels --------------------------------------------------------------------------------------


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
                _add_product(dl, g, inner.t())
            if dc is None and dr is None:
                return
            lg = (g if self.l is None else self.l.t() @ g).view(self.dl * self.ic * p, -1)
            if dr is not None:
                _add_product(dr, c.view(-1, self.dr).t(), lg)
            if dc is not None:
                dc.copy_((lg if self.r is None else lg @ self.r.t()).view(c.shape))
        else:
            g = g.reshape(-1, self.ir * self.jr)
            if dr is not None:
                _add_product(dr, inner.t(), g)
            if dc is None and dl is None:
                return
            gr = (g if self.r is None else g @ self.r.t()).view(self.il * self.jl, -1)
            if dl is not None:
                _add_product(dl, gr, c.view(self.dl, -1).t())
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
        gathered = grad.new_zeros(shape)
        for j, view in views:
            gathered[:, j, : view.shape[2]] = view
        return gathered.view(shape[0], -1)


def _panels(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, y: Tensor, plan: Plan) -> None:
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


def _panels_backward(
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
    return dx, _unmerge(cores, plan, part_grads, gradients)


# --- embedding -----------------------------------------------------------------------------------

# Distinct ids whose rows are formed together: their states stay within this many elements.
EMBEDDING_BLOCK = 2**22


def embedding(ids: Tensor, cores: Sequence[Tensor], embedding_dim: int) -> Tensor:
    """Rows ``[len(ids), embedding_dim]`` of the table, each distinct one formed once."""
    distinct, places = torch.unique(ids, return_inverse=True)
    rows = cores[0].new_empty(len(distinct), embedding_dim)
    for block in _id_blocks(distinct, cores):
        states, _ = _embedding_states(distinct[block], cores)
        rows[block] = states[-1].view(len(states[-1]), -1)[:, :embedding_dim]
    return rows[places]


def embedding_backward(
    grad: Tensor, ids: Tensor, cores: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the cores from ``grad [len(ids), embedding_dim]``."""
    accumulate = torch.promote_types(grad.dtype, torch.float32)
    sums = [
        torch.zeros(core.shape, dtype=accumulate, device=core.device) if need else None
        for core, need in zip(cores, needs, strict=True)
    ]
    if len(ids):
        distinct, places = torch.unique(ids, return_inverse=True)
        columns = math.prod(core.shape[2] for core in cores)
        of_rows = grad.new_zeros(len(distinct), columns, dtype=accumulate)
        of_rows[:, : grad.shape[1]].index_add_(0, places, grad.to(accumulate))
        first = min(k for k, need in enumerate(needs) if need)
        for block in _id_blocks(distinct, cores):
            states, levels = _embedding_states(distinct[block], cores)
            flow = of_rows[block].to(grad.dtype)
            for k in range(len(cores) - 1, first - 1, -1):
                flow = _embedding_step_backward(
                    flow, states[k], cores[k], levels[k], sums[k], k > first
                )
    return [
        None if total is None else total.to(core.dtype)
        for total, core in zip(sums, cores, strict=True)
    ]


def _id_blocks(distinct: Tensor, cores: Sequence[Tensor]) -> Iterator[slice]:
    """Blocks of sorted ids; neighbours share most of their digits, so little is formed twice."""
    columns, largest = 1, 1
    for core in cores:
        columns *= core.shape[2]
        largest = max(largest, columns * core.shape[3])
    size = max(1, EMBEDDING_BLOCK // largest)
    for start in range(0, len(distinct), size):
        yield slice(start, start + size)


def _embedding_states(
    ids: Tensor, cores: Sequence[Tensor]
) -> tuple[list[Tensor], list[list[tuple[int, Tensor, Tensor]]]]:
    """Products of the leading cores for each distinct prefix of the digits of sorted ids.

    Returns:
        states: state k is ``[prefixes of k digits, ∏ j done, D_k]``.
        levels: for each core, (digit, its prefixes, their parents) wherever the digit occurs.
    """
    states, levels = [cores[0].new_ones(1, 1, 1)], []
    rest = math.prod(core.shape[1] for core in cores)
    prefixes = ids.new_zeros(1)
    for core in cores:
        _, i, j, r = core.shape
        rest //= i
        longer = torch.unique_consecutive(ids // rest)
        parents = torch.searchsorted(prefixes, longer // i)
        digits, level = longer % i, []
        state = core.new_empty(len(longer), states[-1].shape[1] * j, r)
        for digit in digits.unique().tolist():
            children = (digits == digit).nonzero().view(-1)
            level.append((digit, children, parents[children]))
            product = torch.matmul(states[-1][level[-1][2]], core[:, digit].reshape(-1, j * r))
            state[children] = product.view(len(children), -1, r)
        states.append(state)
        levels.append(level)
        prefixes = longer
    return states, levels


def _embedding_step_backward(
    flow: Tensor,
    state: Tensor,
    core: Tensor,
    level: Sequence[tuple[int, Tensor, Tensor]],
    total: Tensor | None,
    pass_on: bool,
) -> Tensor:
    """Add one core's gradient to ``total``; the gradient of the state before it."""
    d, _, j, r = core.shape
    before = torch.zeros_like(state) if pass_on else state
    for digit, children, parents in level:
        of_product = flow[children].view(len(children) * state.shape[1], j * r)
        if total is not None:
            total[:, digit] += (state[parents].view(-1, d).t() @ of_product).view(d, j, r)
        if pass_on:
            of_state = (of_product @ core[:, digit].reshape(d, j * r).t()).view(
                len(children), -1, d
            )
            before.index_add_(0, parents, of_state)
    return before
