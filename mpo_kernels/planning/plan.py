"""What a plan is: how the cores are merged into parts, and the products that contract them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import torch

CoreShape: TypeAlias = tuple[int, int, int, int]
CoreShapes: TypeAlias = Sequence[CoreShape]


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
class Gradients:
    """Which gradients a backward pass is asked for."""

    x: bool
    cores: tuple[bool, ...]


class Call(NamedTuple):
    """What is asked of a contraction: all that a plan depends on but the device.

    A tuple, since it is looked up at every call of a layer.

    Attributes:
        shapes: ``[D_k, i_k, j_k, D_{k+1}]`` of each core.
        features: true in and out, which factors may pass.
        rows: product of x's leading dimensions.
        dtype: what is computed in.
        gradients: what a backward pass must form; ``None`` is the forward pass.
    """

    shapes: tuple[CoreShape, ...]
    features: tuple[int, int]
    rows: int
    dtype: torch.dtype
    gradients: Gradients | None = None

    @property
    def bucketed(self) -> Call:
        """At the power of two of rows that plans are made for."""
        return Call(self[0], self[1], row_bucket(self[2]), self[3], self[4])


class Launch(NamedTuple):
    """One kernel of a plan.

    Attributes:
        result: ``"y"``, ``"dx"``, or the part whose gradient it is, ``"left"`` or ``"right"``.
        first: what is contracted first: for y and dx the ``"left"`` or the ``"right"`` part, for a
            gradient the other part with ``"x"`` or with ``"dy"``.
        tile: the kernel's tile, or a chain of products, which say what they are.
        problem: sizes as a kernel of triton sees them.
    """

    result: str
    first: str
    tile: Any
    problem: Any = None


@dataclass(frozen=True)
class Plan:
    """A contraction for one shape and row bucket, and what was weighed against it.

    Attributes:
        algorithm: ``"chain"`` or ``"panels"`` of the library's products, the small ones of panels
            by a kernel where there is one, or ``"fused"`` (two parts, each result in one kernel).
        order: ``"left"`` or ``"right"``: from which end a chain takes the parts; ``"columns"`` or
            ``"rows"``: of W, that a panel holds.
        split: where the cores are cut into merged parts, n = 5: (2, 3) is T1T2 | T3 | T4T5.
        rows: the row bucket planned for, a power of two.
        block: rows at a time (chain), or j (columns) or i (rows) of the first part at a time
            (panels); 0 where one is too many.
        macs: multiply-adds of the whole call.
        fixed_macs: those of them that do not depend on rows: merging cores, forming panels.
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
    launches: tuple[Launch, ...] = ()
    measured_us: float | None = None
    fixed_macs: int = 0
    candidates: tuple[Plan, ...] = field(default=(), repr=False, compare=False)

    def macs_for(self, rows: int) -> int:
        """Multiply-adds of a call of so many rows, of the bucket planned for."""
        return self.fixed_macs + (self.macs - self.fixed_macs) * rows // self.rows

    def __str__(self) -> str:
        lines = [
            f"{'algorithm':<10} {'order':<7} {'split':<12} {'block':>6} {'MMAC':>10} {'MB':>8} "
            f"{'predicted':>12} {'measured':>12}   rows ≤ {self.rows}"
        ]
        for plan in self.candidates[:8]:
            mark = "  <- chosen" if plan == self else ""
            truth = "–" if plan.measured_us is None else f"{plan.measured_us:.0f} µs"
            lines.append(
                f"{plan.algorithm:<10} {plan.order:<7} {plan.split!s:<12} {plan.block:>6} "
                f"{plan.macs / 1e6:>10.2f} {plan.bytes / 1e6:>8.2f} "
                f"{plan.predicted_us:>9.0f} µs {truth:>12}{mark}"
            )
        if len(self.candidates) > 8:
            lines.append(f"… and {len(self.candidates) - 8} slower candidates")
        for launch in self.launches:
            lines.append(f"{launch.result}: {launch.first} first, {launch.tile}")
        return "\n".join(lines)


def best_of(candidates: Sequence[Plan]) -> Plan:
    """The fastest by prediction; it knows the others."""
    ordered = sorted(candidates, key=lambda plan: plan.predicted_us)
    return replace(ordered[0], candidates=tuple(ordered))


def row_bucket(rows: int) -> int:
    """The power of two that a plan for ``rows`` rows is made for."""
    return 1 << max(rows - 1, 0).bit_length()


def shapes_of(cores: Sequence[torch.Tensor]) -> tuple[CoreShape, ...]:
    """``[D_k, i_k, j_k, D_{k+1}]`` of each core."""
    return tuple([(d, i, j, r) for d, i, j, r in (core.shape for core in cores)])


def features_of(shapes: CoreShapes) -> tuple[int, int]:
    """In and out of a layer that is not padded."""
    return math.prod(s[1] for s in shapes), math.prod(s[2] for s in shapes)


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
