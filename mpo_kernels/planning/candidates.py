"""The library's contractions of a layer: every candidate with its cost, and the fastest.

A candidate first merges contiguous groups of cores into parts. A *chain* applies the parts to x
one after the other, from the left or from the right; *panels* multiply them into a few columns of
W at a time, which one GEMM uses, or for gradients a few rows. The cost of each is a list of GEMMs
and of bytes moved; the plan is a pure function of the core shapes, the row bucket, the dtype, the
device's figures and whether panels have a kernel that permutes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

from mpo_kernels.planning.figures import DeviceFigures
from mpo_kernels.planning.plan import (
    Call,
    CoreShapes,
    Gradients,
    Plan,
    Step,
    best_of,
    features_of,
    groups,
    merged_parts,
    merged_shape,
)
from mpo_kernels.planning.work import Work, exposed, folds, merge_work, time_of


def plan_library(call: Call, figures: DeviceFigures, digits: bool = False) -> Plan:
    """The fastest predicted contraction by library products, on a device of these figures.

    With ``digits`` the small products of panels take operands that lie as chains of digits.
    """
    return _plan(call.bucketed, figures, digits)


def widened(plan: Plan, shapes: CoreShapes, figures: DeviceFigures) -> Plan:
    """The plan where cores lie in one byte an element, and are widened before they are read."""
    # A byte of each element is read, and two are written, read and written scaled.
    work = [Work(bytes=7 * math.prod(shape), count=2) for shape in shapes]
    moved, us = sum(w.bytes for w in work), 1e6 * time_of(work, figures)
    return best_of(
        [
            replace(each, bytes=each.bytes + moved, predicted_us=each.predicted_us + us)
            for each in plan.candidates
        ]
    )


@lru_cache(maxsize=4096)
def _plan(call: Call, figures: DeviceFigures, digits: bool) -> Plan:
    candidates = list(_candidates(call, figures, digits))
    # Only a matrix that no split can keep below half of W, such as one column, is formed whole.
    candidates = [plan for plan in candidates if plan.block] or [
        replace(plan, block=1) for plan in candidates
    ]
    return best_of(candidates)


def chain_steps(parts: CoreShapes, order: str) -> list[Step]:
    """The products of a chain, in the order they are computed.

    From the left the state is [rows, ∏ j done, (D, i), ∏ i to come], from the right
    [rows, ∏ i to come, (i, D), ∏ j done]: each product lands where the next one reads it, so the
    batch is never permuted.
    """
    steps, indices = [], range(len(parts))
    for k in indices if order == "left" else reversed(indices):
        d, i, j, r = parts[k]
        before = math.prod(p[2 if order == "left" else 1] for p in parts[:k])
        after = math.prod(p[1 if order == "left" else 2] for p in parts[k + 1 :])
        m, inner = (j * r, d * i) if order == "left" else (d * j, i * r)
        steps.append(Step(part=k, m=m, n=after, k=inner, batch=before))
    return steps


def _candidates(call: Call, figures: DeviceFigures, digits: bool) -> Iterator[Plan]:
    shapes, rows, itemsize, gradients = call.shapes, call.rows, call.dtype.itemsize, call.gradients
    n = len(shapes)
    ins, outs = features_of(shapes)
    x_and_y = itemsize * rows * (ins + outs)
    # At few rows a product has little to do while it waits for them.
    cores = Work(count=0, bytes=itemsize * sum(math.prod(s) for s in shapes))

    def priced(
        algorithm: str,
        order: str,
        split: tuple[int, ...],
        block: int,
        work: list[Work],
        steps: Sequence[Step] = (),
        fixed: Sequence[Work] = (),
    ) -> Plan:
        copies_nothing = digits and algorithm == "panels"
        merging = merge_work(shapes, split, itemsize, gradients, copies_nothing)
        fixed = [*merging, *fixed]
        waited = exposed(x_and_y, work, figures)
        work = [cores, *fixed, *work]
        macs, moved = sum(w.macs for w in work), x_and_y + sum(w.bytes for w in work)
        return Plan(
            algorithm,
            order,
            split,
            rows,
            block,
            macs,
            moved,
            1e6 * time_of(work, figures, waited),
            tuple(steps),
            fixed_macs=sum(w.macs for w in fixed),
        )

    for cuts in range(2 ** (n - 1)):
        split = tuple(k for k in range(1, n) if cuts >> (k - 1) & 1)
        if parts := merged_parts(shapes, split):
            needs = _part_needs(gradients, split, n)
            for order in ("left", "right"):
                steps = chain_steps(parts, order)
                block, work = _chain_work(steps, call, figures, needs)
                # What is not read as it lies is transposed once, in short runs.
                turned = [
                    math.prod(parts[s.part])
                    for s in steps
                    if (s.n > 1 if order == "left" else parts[s.part][1] > 1 < parts[s.part][2])
                ]
                work += [Work(bytes=4 * size * itemsize) for size in turned]
                if order == "right" and any(2 * size > ins * outs for size in turned):
                    block = 0  # a copy as large as W
                yield priced("chain", order, split, block, work, steps)
            if len(parts) > 1:
                for order in ("columns", "rows") if gradients and digits else ("columns",):
                    block, work, fixed = _panels_work(parts, call, figures, needs, order, digits)
                    yield priced("panels", order, split, block, work, fixed=fixed)


def _part_needs(gradients: Gradients | None, split: tuple[int, ...], n: int) -> list[bool]:
    if gradients is None:
        return [False] * (len(split) + 1)
    return [any(gradients.cores[a:b]) for a, b in groups(split, n)]


def _chain_work(
    steps: Sequence[Step], call: Call, figures: DeviceFigures, needs: Sequence[bool]
) -> tuple[int, list[Work]]:
    rows, itemsize, gradients = call.rows, call.dtype.itemsize, call.gradients
    # x and y are there whatever the block: it is for the states between them.
    states = [s.gives for s in steps[:-1]]
    held = sum(states) if gradients else max(a + b for a, b in pairwise([0, *states, 0]))
    ins, outs = steps[0].takes, steps[-1].gives
    # None is larger than half of W, or than x or y where those are larger still; the bucket is
    # less than twice the rows.
    limit = max(ins * outs // 2, rows // 2 * max(ins, outs))
    block = rows
    if states:
        fits = figures.block_bytes // (held * itemsize)
        block = min(rows, max(1, fits), limit // max(states))
    blocks = -(-rows // max(block, 1))
    # As good as equal, so that the last one is not small.
    block = min(block, -(-rows // blocks))
    work = []

    def product(m: int, n: int, k: int, batch: int) -> None:
        per_block = batch * max(block, 1)
        moved = 0
        if n == 1 or folds(n, m * k * itemsize):
            moved = 0 if n == 1 else 2 * blocks * per_block * n * (m + k) * itemsize
            m, n, k, per_block = per_block * n, m, k, 1
        work.append(Work(m, n, k, per_block, count=blocks, bytes=moved))

    asked = [index for index, step in enumerate(steps) if needs[step.part]]
    for step in steps[: max(asked, default=0)] if gradients else steps:
        product(step.m, step.n, step.k, step.batch)
    if gradients:
        for index, step in enumerate(reversed(steps)):
            below = [needs[s.part] for s in steps[: len(steps) - 1 - index]]
            if gradients.x or any(below):
                product(step.k, step.n, step.m, step.batch)
            if needs[step.part]:
                work.append(Work(step.m, step.k, step.batch * max(block, 1) * step.n, count=blocks))
    return block, work


def _panels_work(
    parts: CoreShapes,
    call: Call,
    figures: DeviceFigures,
    needs: Sequence[bool],
    order: str,
    digits: bool,
) -> tuple[int, list[Work], list[Work]]:
    """Panels at a time, what they do to rows, and what forms them and takes them apart."""
    rows, itemsize, gradients = call.rows, call.dtype.itemsize, call.gradients
    ins, outs = math.prod(p[1] for p in parts), math.prod(p[2] for p in parts)
    leading, whole = parts[0][1 if order == "rows" else 2], ins * outs
    # Elements of each product for one j (or i) of the first part: A_p, A_p · B, …, the panel.
    sizes = [math.prod(merged_shape(parts[: k + 1])) // leading for k in range(len(parts))]
    block = min(leading, min(whole // 2, figures.panel_bytes // itemsize) // max(sizes))
    # One is the floor, as long as it stays within half of W.
    block = max(block, int(2 * max(sizes) <= whole))
    panels = -(-leading // max(block, 1))
    # Averaged over the panels, the last of which may be narrower.
    sizes = [size * leading // panels for size in sizes]
    height, width = (sizes[-1] // outs, outs) if order == "rows" else (ins, sizes[-1] // ins)

    def product(m: int, n: int, k: int) -> Work:
        return Work(m, n, k, count=panels)

    permuted = [] if digits else [Work(bytes=2 * sizes[-1] * itemsize * panels, count=panels)]
    fixed = [
        product(sizes[k - 1] // parts[k][0], math.prod(parts[k][1:]), parts[k][0])
        for k in range(1, len(parts))
    ]
    fixed += permuted
    if gradients is None:
        return block, [product(rows, width, height)], fixed
    work = []
    if gradients.x:
        work.append(product(rows, height, width))
        if order == "columns":
            # Sums of 16 bits are in fp32, to which each panel's product is added.
            added = panels + 1 if itemsize == 2 and panels > 1 else 0
            work.append(Work(bytes=2 * rows * ins * itemsize * panels, count=added))
    if any(needs):
        work += [product(height, width, rows), *permuted]
    for k in range(len(parts) - 1, 0, -1):
        if needs[k]:
            fixed.append(product(parts[k][0], math.prod(parts[k][1:]), sizes[k - 1] // parts[k][0]))
        if any(needs[:k]):
            fixed.append(product(sizes[k - 1] // parts[k][0], parts[k][0], math.prod(parts[k][1:])))
    return block, work, fixed
