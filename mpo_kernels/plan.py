"""Which contraction computes a layer: candidates, their costs, the choice and its explanation.

A candidate first merges contiguous groups of cores into parts. A *chain* applies the parts to x
one after the other, from the left or from the right; *panels* multiply them into a few columns of
W at a time, which one GEMM uses. The cost of each is a list of GEMMs and of bytes moved; the
plan is a pure function of the core shapes, the row bucket, the dtype and the device's figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeAlias

import torch

from mpo_kernels.figures import DeviceFigures

CoreShape: TypeAlias = tuple[int, int, int, int]
CoreShapes: TypeAlias = Sequence[CoreShape]


def folds(n: int, matrix_bytes: int) -> bool:
    """Whether ``A × state [batch, k, n]`` is one tall product, at the price of two transpositions.

    A batched product leaves the vector lanes idle below 8 columns, and reads A anew for each
    batch: below 64 columns that costs more than the transpositions once A is out of cache.
    """
    return 1 < n < (64 if matrix_bytes > 8 * 2**20 else 8)


@dataclass(frozen=True)
class Work:
    """``count`` GEMMs ``[m, k] × [k, n]`` of ``batch`` matrices, and bytes moved beside them."""

    m: int = 0
    n: int = 0
    k: int = 0
    batch: int = 1
    count: int = 1
    bytes: int = 0

    @property
    def macs(self) -> int:
        return self.m * self.n * self.k * self.batch * self.count

    def seconds(self, figures: DeviceFigures) -> float:
        seconds = self.count * figures.launch_seconds + self.bytes / figures.bytes_per_second
        if self.macs:
            # Short sides leave vector lanes, registers and multiprocessors idle.
            sides = (self.m, self.n, self.k)
            used = math.prod(side / (side + figures.side) for side in sides)
            seconds += self.macs / (figures.macs_per_second * used)
        return seconds


def time_of(
    work: Sequence[Work], figures: DeviceFigures, kernels: float = 0.0, started: float = 0.0
) -> float:
    """Seconds of a plan: the geometric mean of a replayed CUDA graph's and of an eager call's.

    A graph takes the device's time; eagerly the host starts calls while the device is at earlier
    ones, and the slower of the two decides. On a CPU both are the same.

    Args:
        work: library calls.
        figures: of the device.
        kernels: seconds of what the device does beside them.
        started: as many library calls as take the host as long as starting those kernels.
    """
    device = kernels + sum(w.seconds(figures) for w in work)
    host = figures.host_seconds * (started + sum(w.count for w in work))
    return math.sqrt(device * max(device, host))


@dataclass(frozen=True)
class Step:
    """One product of a chain: ``A [m, k] × state [batch, k, n] -> [batch, m, n]`` for each row."""

    part: int
    m: int
    n: int
    k: int
    batch: int

    @property
    def takes(self) -> int:
        """Elements of a row's state before it; of x, where it is the first."""
        return self.batch * self.k * self.n

    @property
    def gives(self) -> int:
        """Elements of a row's state after it; of y, where it is the last."""
        return self.batch * self.m * self.n


@dataclass(frozen=True)
class Plan:
    """A contraction for one shape and row bucket, and what was weighed against it.

    Attributes:
        algorithm: ``"chain"`` or ``"panels"`` of the library's products, ``"fused"`` (the chain in
            one kernel) or ``"implicit"`` (a GEMM that makes its weight) where there are kernels.
        order: ``"left"`` or ``"right"``: from which end the parts are taken; panels: from the left.
        split: where the cores are cut into merged parts, n = 5: (2, 3) is T1T2 | T3 | T4T5.
        rows: the row bucket planned for, a power of two.
        block: rows at a time (chain) or j of the first part at a time (panels); 0 where one is too
            many.
        macs: multiply-adds of the whole call.
        bytes: bytes of x, y and cores, and of what passes through memory between.
        predicted_us: predicted time in microseconds, see :func:`time_of`.
        steps: the products of a chain, in order.
        launches: the kernels of a fused plan, with their tiles.
        measured_us: of those kernels, where their tiles were measured on this device.
        candidates: every plan that was weighed, the fastest first.
    """

    algorithm: str
    order: str
    split: tuple[int, ...]
    rows: int
    block: int
    macs: int
    bytes: int
    predicted_us: float
    steps: tuple[Step, ...] = ()
    launches: tuple[Any, ...] = ()
    measured_us: float | None = None
    candidates: tuple[Plan, ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        lines = [
            f"{'algorithm':<10} {'order':<6} {'split':<12} {'block':>6} {'MMAC':>10} {'MB':>8} "
            f"{'predicted':>12} {'measured':>12}   rows ≤ {self.rows}"
        ]
        for plan in self.candidates[:8]:
            mark = "  <- chosen" if plan == self else ""
            truth = "–" if plan.measured_us is None else f"{plan.measured_us:.0f} µs"
            lines.append(
                f"{plan.algorithm:<10} {plan.order:<6} {plan.split!s:<12} {plan.block:>6} "
                f"{plan.macs / 1e6:>10.2f} {plan.bytes / 1e6:>8.2f} "
                f"{plan.predicted_us:>9.0f} µs {truth:>12}{mark}"
            )
        if len(self.candidates) > 8:
            lines.append(f"… and {len(self.candidates) - 8} slower candidates")
        for launch in self.launches:
            lines.append(f"{launch.result}: {launch.first} first, {launch.tile}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Gradients:
    """Which gradients a backward pass is asked for."""

    x: bool
    cores: tuple[bool, ...]


def plan_linear(
    core_shapes: Sequence[Sequence[int]],
    rows: int,
    dtype: torch.dtype,
    figures: DeviceFigures,
    gradients: Gradients | None = None,
) -> Plan:
    """The fastest predicted contraction, forward or (with ``gradients``) backward.

    Args:
        core_shapes: ``[D_k, i_k, j_k, D_{k+1}]`` of each core.
        rows: product of x's leading dimensions; planned for the next power of two.
        dtype: what is computed in.
        figures: of the device.
        gradients: what the backward pass must form; ``None`` plans the forward pass.
    """
    shapes = tuple((d, i, j, r) for d, i, j, r in core_shapes)
    return _plan(shapes, row_bucket(rows), dtype, figures, gradients)


def shapes_of(cores: Sequence[torch.Tensor]) -> list[CoreShape]:
    """``[D_k, i_k, j_k, D_{k+1}]`` of each core."""
    return [(d, i, j, r) for d, i, j, r in (core.shape for core in cores)]


def features_of(shapes: CoreShapes) -> tuple[int, int]:
    """In and out of a layer that is not padded."""
    return math.prod(s[1] for s in shapes), math.prod(s[2] for s in shapes)


def row_bucket(rows: int) -> int:
    """The power of two that a plan for ``rows`` rows is made for."""
    return 1 << max(rows - 1, 0).bit_length()


@lru_cache(maxsize=4096)
def _plan(
    shapes: CoreShapes,
    rows: int,
    dtype: torch.dtype,
    figures: DeviceFigures,
    gradients: Gradients | None,
) -> Plan:
    candidates = list(_candidates(shapes, rows, dtype.itemsize, figures, gradients))
    # Only a matrix that no split can keep below half of W, such as one column, is formed whole.
    candidates = [plan for plan in candidates if plan.block] or [
        replace(plan, block=1) for plan in candidates
    ]
    return best_of(candidates)


def best_of(candidates: Sequence[Plan]) -> Plan:
    """The fastest by prediction; it knows the others."""
    ordered = sorted(candidates, key=lambda plan: plan.predicted_us)
    return replace(ordered[0], candidates=tuple(ordered))


def groups(split: Sequence[int], num_cores: int) -> list[tuple[int, int]]:
    """The ranges of cores between the cuts of ``split``."""
    return list(zip((0, *split), (*split, num_cores), strict=True))


def merged_shape(shapes: CoreShapes) -> CoreShape:
    """Shape of neighbouring cores contracted into one."""
    ins, outs = math.prod(s[1] for s in shapes), math.prod(s[2] for s in shapes)
    return shapes[0][0], ins, outs, shapes[-1][3]


def merged_parts(shapes: CoreShapes, split: Sequence[int]) -> list[CoreShape]:
    """The shapes of the parts between the cuts, or none at all where one would pass half of W."""
    dense = math.prod(s[1] for s in shapes) * math.prod(s[2] for s in shapes)
    parts = [(merged_shape(shapes[a:b]), b - a) for a, b in groups(split, len(shapes))]
    fits = all(count < 2 or 2 * math.prod(part) <= dense for part, count in parts)
    return [part for part, _ in parts] if fits else []


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


def _candidates(
    shapes: CoreShapes,
    rows: int,
    itemsize: int,
    figures: DeviceFigures,
    gradients: Gradients | None,
) -> Iterator[Plan]:
    n = len(shapes)
    dense = math.prod(s[1] for s in shapes) * math.prod(s[2] for s in shapes)
    x_y_cores = Work(
        count=0,
        bytes=itemsize
        * (
            rows * (math.prod(s[1] for s in shapes) + math.prod(s[2] for s in shapes))
            + sum(math.prod(s) for s in shapes)
        ),
    )

    def priced(
        algorithm: str,
        order: str,
        split: tuple[int, ...],
        block: int,
        work: list[Work],
        steps: Sequence[Step] = (),
    ) -> Plan:
        work = [x_y_cores, *merge_work(shapes, split, itemsize, gradients), *work]
        macs, moved = sum(w.macs for w in work), sum(w.bytes for w in work)
        us = 1e6 * time_of(work, figures)
        return Plan(algorithm, order, split, rows, block, macs, moved, us, tuple(steps))

    for cuts in range(2 ** (n - 1)):
        split = tuple(k for k in range(1, n) if cuts >> (k - 1) & 1)
        if parts := merged_parts(shapes, split):
            needs = _part_needs(gradients, split, n)
            for order in ("left", "right"):
                steps = chain_steps(parts, order)
                block, work = _chain_work(steps, rows, itemsize, figures, gradients, needs)
                # What is not read as it lies is transposed once, in short runs.
                turned = [
                    math.prod(parts[s.part])
                    for s in steps
                    if (s.n > 1 if order == "left" else parts[s.part][1] > 1 < parts[s.part][2])
                ]
                work += [Work(bytes=4 * size * itemsize) for size in turned]
                if order == "right" and any(2 * size > dense for size in turned):
                    block = 0  # a copy as large as W
                yield priced("chain", order, split, block, work, steps)
            if len(parts) > 1:
                block, work = _panels_work(parts, rows, itemsize, figures, gradients, needs)
                yield priced("panels", "left", split, block, work)


def _part_needs(gradients: Gradients | None, split: tuple[int, ...], n: int) -> list[bool]:
    if gradients is None:
        return [False] * (len(split) + 1)
    return [any(gradients.cores[a:b]) for a, b in groups(split, n)]


def merge_work(
    shapes: CoreShapes, split: tuple[int, ...], itemsize: int, gradients: Gradients | None
) -> list[Work]:
    """The products and copies that merge the cores between the cuts, and take gradients apart."""
    work = []
    for a, b in groups(split, len(shapes)):
        # A trained part is taken apart again: two products for each that merged it.
        times = 3 if gradients and any(gradients.cores[a:b]) else 1
        for k in range(a + 1, b):
            d, i, j, r = merged_shape(shapes[a:k])
            _, ik, jk, rk = shapes[k]
            # Written, and transposed in short runs.
            moved = 5 * d * i * j * ik * jk * rk * itemsize
            work += [Work(d * i * j, ik * jk * rk, r, count=times), Work(bytes=moved, count=times)]
    return work


def _chain_work(
    steps: Sequence[Step],
    rows: int,
    itemsize: int,
    figures: DeviceFigures,
    gradients: Gradients | None,
    needs: Sequence[bool],
) -> tuple[int, list[Work]]:
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

    for step in steps[:-1] if gradients else steps:
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
    rows: int,
    itemsize: int,
    figures: DeviceFigures,
    gradients: Gradients | None,
    needs: Sequence[bool],
) -> tuple[int, list[Work]]:
    leading, features = parts[0][2], math.prod(p[1] for p in parts)
    whole = features * math.prod(p[2] for p in parts)
    # Elements of each product for one j of the first part: A_p, A_p · B, …, the panel.
    sizes = [math.prod(merged_shape(parts[: k + 1])) // leading for k in range(len(parts))]
    block = min(leading, min(whole // 2, figures.panel_bytes // itemsize) // max(sizes))
    # One j is the floor, as long as it stays within half of W.
    block = max(block, int(2 * max(sizes) <= whole))
    panels = -(-leading // max(block, 1))
    # Averaged over the panels, the last of which may be narrower.
    sizes = [size * leading // panels for size in sizes]
    columns = sizes[-1] // features

    def product(m: int, n: int, k: int) -> Work:
        return Work(m, n, k, count=panels)

    permuted = Work(bytes=2 * sizes[-1] * itemsize * panels, count=panels)
    work = [
        product(sizes[k - 1] // parts[k][0], math.prod(parts[k][1:]), parts[k][0])
        for k in range(1, len(parts))
    ]
    work.append(permuted)
    if gradients is None:
        return block, [*work, product(rows, columns, features)]
    if gradients.x:
        moved = 2 * rows * features * itemsize * panels
        work += [product(rows, features, columns), Work(bytes=moved, count=0)]
    if any(needs):
        work += [product(features, columns, rows), permuted]
    for k in range(len(parts) - 1, 0, -1):
        if needs[k]:
            work.append(product(parts[k][0], math.prod(parts[k][1:]), sizes[k - 1] // parts[k][0]))
        if any(needs[:k]):
            work.append(product(sizes[k - 1] // parts[k][0], parts[k][0], math.prod(parts[k][1:])))
    return block, work
