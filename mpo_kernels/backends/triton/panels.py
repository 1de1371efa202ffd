"""Streamed panels by one kernel and the library's large products, for any number of parts.

A panel is a few columns of W (some j of the first part) or, in backward, a few rows (some i): dx is
then not summed over panels. With the digits of part k called i_k, j_k and its right bond r_k:

    forward    X_k = X_{k-1} · P_k,  W_p = X_{n-2} · P_{n-1},  y_p = x · W_p + bias
    backward   dx_p = dy · W_pᵀ,  F_{n-1} = dW_p = x_pᵀ · dy,  dP_k += X_{k-1}ᵀ · F_k,
               F_{k-1} = F_k · P_kᵀ

with X_0 the panel's share of the first part. Sums over k are shared out, and added up by the
products that take a part's gradient apart into its cores': a share is one more digit of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mpo_kernels.backends.torch.merging import add_product
from mpo_kernels.backends.triton.device import limits
from mpo_kernels.backends.triton.product import (
    Job,
    Product,
    Task,
    product_of,
    run,
    run_rows,
    sum_splits,
)
from mpo_kernels.backends.triton.tiles import Limits, product_tile
from mpo_kernels.planning.plan import CoreShape, Gradients, Plan, groups, shapes_of

# In fp32 the library's products have the device's rate, and the kernel has not.
DTYPES = (torch.float16, torch.bfloat16)


def _task(p: Product, itemsize: int, limits: Limits, most: int = 0) -> Task:
    """With k shared out where its sums may take ``most`` elements."""
    return Task(p, product_tile(p.m, p.n, p.k, itemsize, limits, most // p.share))


@lru_cache(maxsize=1024)
def _shared_out(task: Task, splits: int) -> Task:
    """A last panel is narrower, and k would be shared out further than there is room for."""
    return Task(task.product, task.tile._replace(splits=splits))


def _empty(task: Task, like: Tensor) -> Tensor:
    """For sums of a product: ``[splits, m · n]`` in fp32."""
    return like.new_empty(task.tile.splits, task.product.share, dtype=torch.float32)


# --- Cores to parts, and gradients of parts to those of cores ---


def _merged_sizes(a: CoreShape, b: CoreShape) -> dict[str, int]:
    """The digits of two cores ``[d, i, j, r]`` and ``[r, u, v, s]``."""
    return dict(zip("dijr", a, strict=True)) | dict(zip("uvs", b[1:], strict=True))


@lru_cache(maxsize=1024)
def merging_task(a: CoreShape, b: CoreShape, itemsize: int, limits: Limits) -> Task:
    """Of two neighbouring cores."""
    sizes = _merged_sizes(a, b)
    return _task(product_of("d i j r", "r u v s", "d i u j v s", sizes), itemsize, limits)


@lru_cache(maxsize=1024)
def parting_tasks(
    a: CoreShape, b: CoreShape, shares: int, itemsize: int, limits: Limits, most: int
) -> tuple[Task, Task]:
    """The gradients of what was merged, from ``[shares, d, i, u, j, v, s]``."""
    sizes = _merged_sizes(a, b) | {"z": shares}
    merged = "z d i u j v s"
    return (
        _task(product_of(merged, "r u v s", "d i j r", sizes), 4, limits, most),
        _task(product_of("d i j r", merged, "r u v s", sizes), 4, limits, most),
    )


def _run_pairs(jobs: Sequence[Job]) -> None:
    for k in range(0, len(jobs), 2):
        run(*jobs[k : k + 2])


def merge(cores: Sequence[Tensor], split: Sequence[int]) -> list[list[Tensor]]:
    """For each group of ``split``: its first core, its first two merged, …, the part."""
    merged = [[cores[a].contiguous()] for a, _ in groups(split, len(cores))]
    device_limits = limits(cores[0].device)
    for depth in range(1, len(cores)):
        jobs = []
        for (a, b), parts in zip(groups(split, len(cores)), merged, strict=True):
            if depth < b - a:
                left, core = parts[-1], cores[a + depth].contiguous()
                (d, i, j, _), (_, u, v, s) = left.shape, core.shape
                task = merging_task(
                    tuple(left.shape), tuple(core.shape), left.element_size(), device_limits
                )
                parts.append(left.new_empty(d, i * u, j * v, s))
                jobs.append(Job(task, left, core, parts[-1]))
        _run_pairs(jobs)
    return merged


def unmerge(
    cores: Sequence[Tensor],
    split: Sequence[int],
    merged: Sequence[Sequence[Tensor]],
    sums: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The cores' gradients in their dtype, from those of the parts ``[shares, part]`` in fp32."""
    grads: list[Tensor | None] = [None] * len(cores)
    most = math.prod(core.shape[1] * core.shape[2] for core in cores) // 2
    device_limits = limits(cores[0].device)
    shared: list[tuple[int, Tensor]] = []

    def target(k: int, task: Task) -> Tensor:
        if task.tile.splits > 1:
            shared.append((k, _empty(task, cores[k])))
            return shared[-1][1]
        grads[k] = grad = cores[k].new_empty(cores[k].shape)
        return grad

    pending = []
    for (a, b), total in zip(groups(split, len(cores)), sums, strict=True):
        if total is None:
            continue
        if b - a == 1:
            shared.append((a, total))
        else:
            pending.append((a, b - 1, total))
    parts = {a: lefts for (a, _), lefts in zip(groups(split, len(cores)), merged, strict=True)}
    while pending:
        jobs, rest = [], []
        for first, last, total in pending:
            left, core = parts[first][last - first - 1], cores[last].contiguous()
            shapes = tuple(left.shape), tuple(core.shape)
            of_left, of_core = parting_tasks(
                *shapes, total.shape[0], core.element_size(), device_limits, most
            )
            if needs[last]:
                jobs.append(Job(of_core, left, total, target(last, of_core)))
            if last - first == 1 and needs[first]:
                jobs.append(Job(of_left, total, core, target(first, of_left)))
            elif last - first > 1 and any(needs[first:last]):
                rest.append((first, last - 1, _empty(of_left, core)))
                jobs.append(Job(of_left, total, core, rest[-1][2]))
        _run_pairs(jobs)
        pending = rest
    for k, total in shared:
        grads[k] = sum_splits(total, None, cores[k].new_empty(cores[k].shape))
    return grads


# --- Panels ---


class Panel(NamedTuple):
    """The products of a panel of one size."""

    lefts: tuple[Task, ...]  # X_k of X_{k-1}
    form: Task  # W_p of X_{n-2}
    of_part: tuple[Task, ...]  # dP_k of X_{k-1} and F_k, for k from 1
    flows: tuple[Task, ...]  # F_{k-1} of F_k, for k from 1; the first is dP_0


@lru_cache(maxsize=1024)
def panel_tasks(
    shapes: tuple[CoreShape, ...], block: int, by_rows: bool, itemsize: int, limits: Limits
) -> Panel:
    """For parts of these shapes, ``block`` of the first one's j (or i) a panel."""
    n = len(shapes)
    names = [f"r{k - 1} i{k} j{k} r{k}" for k in range(n)]
    sizes = {
        name: size
        for order, shape in zip(names, shapes, strict=True)
        for name, size in zip(order.split(), shape, strict=True)
    }
    digit = "i0" if by_rows else "j0"
    whole, sizes = sizes, sizes | {digit: block}
    most = math.prod(shape[1] * shape[2] for shape in shapes) // 2
    # X_k, as it lies, and W_p.
    x = [" ".join(f"i{q} j{q}" for q in range(k + 1)) + f" r{k}" for k in range(n)]
    panel = " ".join([f"i{k}" for k in range(n)] + [f"j{k}" for k in range(n)])
    parts = ["i0 j0 r0", *names[1:-1], f"r{n - 2} i{n - 1} j{n - 1}"]

    def slice_of(operand: str, k: int) -> dict[str, int]:
        """X_0 lies in the first part."""
        return {f"{operand} {digit}": whole[digit]} if k == 0 else {}

    def task(a: str, b: str, c: str, lies: dict[str, int], most: int = 0) -> Task:
        return _task(product_of(a, b, c, sizes, lies), itemsize, limits, most)

    def flow(k: int) -> str:
        return panel if k == n - 1 else x[k]

    return Panel(
        tuple(task(x[k - 1], parts[k], x[k], slice_of("a", k - 1)) for k in range(1, n - 1)),
        task(x[n - 2], parts[n - 1], panel, slice_of("a", n - 2)),
        tuple(task(x[k - 1], flow(k), parts[k], slice_of("a", k - 1), most) for k in range(1, n)),
        tuple(
            task(flow(k), parts[k], x[k - 1], slice_of("c", k - 1), most if k == 1 else 0)
            for k in range(1, n)
        ),
    )


def _blocks(size: int, block: int, width: int, features: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of a digit of the first part, and the true columns or rows they stand for."""
    for start in range(0, size, block):
        stop = min(start + block, size)
        if start * width < features:
            yield slice(start, stop), slice(start * width, min(stop * width, features))


def _form(parts: Sequence[Tensor], first: Tensor, panel: Panel, w: Tensor) -> list[Tensor]:
    """Write the panel into ``w``; the X_k."""
    products = [first]
    for task, part in zip(panel.lefts, parts[1:-1], strict=True):
        products.append(first.new_empty(task.product.m, task.product.n))
        run(Job(task, products[-2], part, products[-1]))
    run(Job(panel.form, products[-1], parts[-1], w))
    return products


def forward(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, y: Tensor, plan: Plan) -> None:
    """Write ``y [rows, out]`` of ``x [rows, in]``."""
    parts = [group[-1] for group in merge(cores, plan.split)]
    shapes, device_limits = shapes_of(parts), limits(x.device)
    ins, outs = (math.prod(shape[k] for shape in shapes) for k in (1, 2))
    width = outs // shapes[0][2]
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    w = x.new_empty(ins * plan.block * width)
    for block, columns in _blocks(shapes[0][2], plan.block, width, y.shape[1]):
        count, true = block.stop - block.start, columns.stop - columns.start
        panel = panel_tasks(shapes, count, False, x.element_size(), device_limits)
        _form(parts, parts[0][0, :, block], panel, w)
        formed = w[: ins * count * width].view(ins, -1)[: x.shape[1], :true]
        if bias is None:
            torch.mm(x, formed, out=y[:, columns])
        else:
            strides = x.stride(0), formed.stride(0), y.stride(0)
            task = gemm_task(x.shape[1], true, strides, plan.rows, x.element_size(), device_limits)
            run_rows(Job(task, x, formed, y[:, columns]), bias[columns])


@lru_cache(maxsize=1024)
def gemm_task(
    k: int, n: int, strides: tuple[int, int, int], rows: int, itemsize: int, limits: Limits
) -> Task:
    """``y [rows, n] = x [rows, k] · W [k, n]``, each with a stride of its rows; of a row bucket."""
    of_x, of_w, of_y = strides
    product = Product(
        0, n, k, 0, ((1,), (n,), (k,)), (((of_x,), (of_y,)), ((1,), (1,)), ((1,), (of_w,)))
    )
    return Task(product, product_tile(rows, n, k, itemsize, limits))


def backward(
    grad: Tensor, x: Tensor, cores: Sequence[Tensor], gradients: Gradients, plan: Plan
) -> tuple[Tensor | None, list[Tensor | None]]:
    """``dx`` and the cores' gradients, ``None`` where not asked for."""
    merged = merge(cores, plan.split)
    parts, by_rows = [group[-1] for group in merged], plan.order == "rows"
    shapes, device_limits = shapes_of(parts), limits(x.device)
    needs = [any(gradients.cores[a:b]) for a, b in groups(plan.split, len(cores))]
    size = shapes[0][1 if by_rows else 2]
    ins, outs = (math.prod(shape[k] for shape in shapes) for k in (1, 2))
    width, features = (ins // size, x.shape[1]) if by_rows else (outs // size, grad.shape[1])
    w = x.new_empty(plan.block * width * (outs if by_rows else ins))
    sums: dict[int, Tensor] = {}
    dx = x.new_empty(x.shape) if gradients.x and by_rows else None
    for block, true in _blocks(size, plan.block, width, features):
        count = block.stop - block.start
        panel = panel_tasks(shapes, count, by_rows, x.element_size(), device_limits)
        of_block = (slice(None), block) if by_rows else (slice(None), slice(None), block)
        products = _form(parts, parts[0][of_block][0], panel, w)
        height = count * width if by_rows else ins
        formed = w[: height * (outs if by_rows else count * width)].view(height, -1)
        of_x, of_grad = (x[:, true], grad) if by_rows else (x, grad[:, true])
        unpadded = formed[: of_x.shape[1], : of_grad.shape[1]]
        if dx is not None and by_rows:
            torch.mm(of_grad, unpadded.t(), out=dx[:, true])
        elif gradients.x:
            dx = add_product(dx, of_grad, unpadded.t())
        if any(needs):
            # In place of the panel; what is padded has no gradient.
            formed[unpadded.shape[0] :].zero_()
            formed[:, unpadded.shape[1] :].zero_()
            torch.mm(of_x.t(), of_grad, out=unpadded)
            _project(formed, parts, products, panel, of_block, needs, sums)
    grads = unmerge(
        cores, plan.split, merged, [sums.get(k) for k in range(len(parts))], gradients.cores
    )
    return None if dx is None else dx.to(x.dtype), grads


def _project(
    flow: Tensor,
    parts: Sequence[Tensor],
    products: Sequence[Tensor],
    panel: Panel,
    of_block: tuple[slice, ...],
    needs: Sequence[bool],
    sums: dict[int, Tensor],
) -> None:
    """Add to the parts' gradients ``[shares, part]`` from that of a panel, last part first."""
    for k in range(len(parts) - 1, 0, -1):
        jobs, again = [], k in sums
        of_part, of_flow = panel.of_part[k - 1], panel.flows[k - 1]
        if needs[k]:
            if not again:
                sums[k] = _empty(of_part, flow)
            jobs.append(Job(of_part, products[k - 1], flow, sums[k]))
        if any(needs[:k]):
            if k > 1:
                below = flow.new_empty(of_flow.product.m, of_flow.product.n)
            else:
                if 0 not in sums:
                    # What is all padding is never written.
                    shape = of_flow.tile.splits, *parts[0].shape
                    sums[0] = flow.new_zeros(shape, dtype=torch.float32)
                of_flow = _shared_out(of_flow, min(of_flow.tile.splits, len(sums[0])))
                below = sums[0][(slice(None), *of_block)]
            jobs.append(Job(of_flow, flow, parts[k], below))
            flow = below
        if jobs:
            run(*jobs, add=again)
