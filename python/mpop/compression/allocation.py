"""One budget over the matrices of a model: to each what lowers the sum of losses most."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpo_kernels.cores.family import Cost, low_ranks
from mpo_kernels.cores.stack import sharings, stack_spectrum
from mpop.compression.calibration import Moments


class Point(NamedTuple):
    """A size that a matrix may have."""

    cost: float
    lost: float  # a squared relative error, or what the model's output loses by second order


def curve(
    weight: Tensor, moments: Moments | None, cost: Cost, shared_core: bool = False
) -> list[Point]:
    """The lower convex hull of (cost, loss) of one matrix, from one rank to dense, cheapest first.

    Or of those of experts together, ``[E, out, in]``, which have one rank. Low rank stands for the
    family here: its losses at all ranks are known from one spectrum, or from two where experts are
    to have a core in common.
    """
    *experts, out_features, in_features = weight.shape
    count = math.prod(experts)
    fit, gradients = (moments.fit, moments.gradients) if moments else (None, None)
    whole, dense = moments.whole(weight) if moments else 1.0, dense_cost(weight, cost)
    points = [Point(dense, 0.0)]
    if shared_core:
        for common in sharings(weight, fit):
            lost = common.lost * (whole / common.lost[0].clamp(min=1e-300))
            sizes = ((rank * common.parameters, loss) for rank, loss in enumerate(lost.tolist()))
            points += [Point(size, loss) for size, loss in sizes if 0 < size < dense]
        return _hull(points)
    squares = stack_spectrum(weight, fit, gradients).square()
    squares *= whole / squares.sum().clamp(min=1e-300)
    tails = torch.cat((squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1))).tolist()
    points += [
        Point(count * cost.of(shape), tails[shape.ranks[0]])
        for shape in low_ranks(in_features, out_features, cost)
    ]
    return _hull(points)


def dense_cost(weight: Tensor, cost: Cost) -> float:
    """Of a matrix, or of those of experts, that stays as it is."""
    *experts, out_features, in_features = weight.shape
    return math.prod(experts) * cost.of_dense(in_features, out_features)


def _hull(points: Sequence[Point]) -> list[Point]:
    """Of points that no other beats, those that no mixture of two others beats."""
    hull: list[Point] = []
    for point in sorted(points):
        if hull and point.lost >= hull[-1].lost:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _gain(a: Point, b: Point) -> float:
    """Loss that goes for a unit of cost, from a to the dearer b."""
    return (a.lost - b.lost) / (b.cost - a.cost) if b.cost > a.cost else float("inf")


def allocate(curves: Sequence[Sequence[Point]], budget: float) -> list[Point]:
    """A point of each curve, together within the budget, with the least sum of losses.

    Greedy by gain for cost, which on convex curves is exact but for the last step that no longer
    fits; smaller ones then fill what is left.

    Raises:
        ValueError: the cheapest points together are above the budget; it says what they cost.
    """
    chosen = [0] * len(curves)
    left = budget - sum(points[0].cost for points in curves)
    if left < 0:
        raise ValueError(
            f"expected a budget of at least {budget - left:.6g}, one rank for each of "
            f"{len(curves)} matrices, got {budget:.6g}"
        )

    def step(k: int) -> Iterator[tuple[float, int]]:
        points, at = curves[k], chosen[k]
        if at + 1 < len(points):
            yield -_gain(points[at], points[at + 1]), k

    queue = [entry for k in range(len(curves)) for entry in step(k)]
    heapq.heapify(queue)
    while queue:
        _, k = heapq.heappop(queue)
        needed = curves[k][chosen[k] + 1].cost - curves[k][chosen[k]].cost
        if needed <= left:
            left -= needed
            chosen[k] += 1
            for entry in step(k):
                heapq.heappush(queue, entry)
    return [points[at] for points, at in zip(curves, chosen, strict=True)]
