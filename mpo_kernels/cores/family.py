"""The members of the family that may hold a matrix, and the one that loses least of its output.

Plain low rank is a member, (1, I) × (J, 1), and under the inputs' second moment its best fit is
known exactly; skewed and balanced chains follow it. Which is best is measured, not assumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, Protocol, TypeAlias, get_args

from torch import Tensor

from mpo_kernels.cores.decompose import (
    Decomposition,
    check_moments,
    check_weight,
    decompose,
    decomposed,
)
from mpo_kernels.cores.shape import MPOShape

Objective: TypeAlias = Literal["parameters", "memory", "latency"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
# After one sweep a fit this much worse than the best is not carried on; at 1.2 some are lost that
# twenty sweeps bring ahead.
_HOPELESS = 1.5


class Cost(Protocol):
    """What members are weighed by, such as :class:`mpo_kernels.layers.cost.LayerCost`."""

    objective: Objective
    interpolative: bool

    def of(self, shape: MPOShape) -> float:
        """Of a layer with these cores."""

    def of_dense(self, in_features: int, out_features: int) -> float:
        """Of the dense layer."""


def members(in_features: int, out_features: int, tensor_parallel: int = 1) -> list[MPOShape]:
    """Factors worth a try, at full rank: low rank first, then skewed, balanced, n = 3, n = 5.

    Only those that can be dealt to ``tensor_parallel`` devices, which must divide both sizes.
    """
    full = min(in_features, out_features)
    shapes = [MPOShape.low_rank(in_features, out_features, full)]
    for part in (2, 4):
        if in_features > part and out_features > part:
            shapes += [
                MPOShape.skewed(in_features, out_features, part, -(-out_features // part), 2**62),
                MPOShape.skewed(in_features, out_features, -(-in_features // part), part, 2**62),
            ]
    shapes += [
        MPOShape.balanced(in_features, out_features, n, tensor_parallel=tensor_parallel)
        for n in (2, 3, 5)
    ]
    return [shape for shape in dict.fromkeys(shapes) if shape.splits(tensor_parallel)]


def low_ranks(in_features: int, out_features: int, cost: Cost) -> Iterator[MPOShape]:
    """Low-rank shapes that cost less than dense, in steps of one rank, or of 16 for latency."""
    dense, step = cost.of_dense(in_features, out_features), 1
    if cost.objective == "latency":
        step = 16
    for rank in range(1, min(in_features, out_features) + 1, step):
        shape = MPOShape.low_rank(in_features, out_features, rank)
        if cost.of(shape) < dense:
            yield shape


def choose(
    weight: Tensor,
    budget: float,
    cost: Cost,
    second_moment: Tensor | None = None,
    judge: Tensor | None = None,
    tensor_parallel: int = 1,
    *,
    gradient_moment: Tensor | None = None,
) -> Decomposition:
    """The member that loses least within the budget, its cores fitted.

    Args:
        weight: ``[out, in]``.
        budget: what it may cost, in the units of ``cost``.
        second_moment: of the layer's inputs; see :func:`mpo_kernels.decompose`. Without it the
            weight's own error decides.
        judge: a second moment of other inputs, in the same scale, by which members are compared.
            The result's ``output_error`` is that of its member on them, fitted without them; its
            cores are then fitted to both.
        tensor_parallel: see :func:`members`.
        gradient_moment: of a loss's gradients at the output; see :func:`mpo_kernels.decompose`.

    Raises:
        TypeError, ValueError: a weight or moments that :func:`mpo_kernels.decompose` refuses, no
            member that is that cheap, or sizes that ``tensor_parallel`` does not divide.
    """
    candidates = members(weight.shape[1], weight.shape[0], tensor_parallel)
    check_weight(weight, candidates[0])
    check_moments(candidates[0], gradient_moment, second_moment, judge)
    judge = second_moment if judge is None else judge

    def fitted(shape: MPOShape, bound: dict[str, Any], sweeps: int) -> Decomposition:
        return decomposed(
            *(weight, shape, bound.get("max_rank"), None, bound.get("compression")),
            *(second_moment, gradient_moment, judge, sweeps),
        )

    def lost(found: Decomposition) -> float:
        return found.rel_error if found.output_error is None else found.output_error

    best: Decomposition | None = None
    is_hopeless = False
    for shape in candidates[:1] if cost.interpolative else candidates:
        if is_hopeless and shape.num_cores > 2:
            break  # of balanced chains the longer lose more
        bound = bound_within(shape, budget, cost)
        if bound is None:
            continue
        found = fitted(shape, bound, 1)
        is_hopeless = best is not None and lost(found) > _HOPELESS * lost(best)
        if is_hopeless or cost.of(found.shape) > budget:
            continue
        if second_moment is not None and best is not None:
            found = fitted(shape, bound, 20)
        if best is None or lost(found) < lost(best):
            best = found
    if best is None:
        raise ValueError(f"expected a budget that one rank meets, got {budget:g}")
    if second_moment is None or judge is None or judge is second_moment:
        return best
    # Chosen on what was held out, which then helps to fit as well.
    refitted = decompose(
        weight, best.shape, second_moment=second_moment + judge, gradient_moment=gradient_moment
    )
    return replace(refitted, output_error=best.output_error)


def bound_within(shape: MPOShape, budget: float, cost: Cost) -> dict[str, Any] | None:
    """What bounds :func:`decompose` to a cost within the budget, None where no rank is."""
    if cost.of(shape.with_ranks(1)) > budget:
        return None
    if cost.objective == "parameters" and not cost.interpolative:
        return {"compression": budget / shape.dense_parameters}
    low, high = 1, max(shape.full_ranks)
    while low < high:  # the largest cap on every bond that is within it
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if cost.of(shape.with_ranks(middle)) <= budget else (low, middle - 1)
        )
    if cost.interpolative:  # two cores with as many as that may have more numbers than W
        return {"max_rank": low}
    return {"compression": shape.with_ranks(low).compression}
