"""Candidates of this back end beside the library's own: two parts, each result in one kernel."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from mpo_kernels.backends.triton import panels, tuning
from mpo_kernels.backends.triton.tiles import Chain, Limits
from mpo_kernels.planning.candidates import plan_library
from mpo_kernels.planning.figures import DeviceFigures
from mpo_kernels.planning.plan import (
    Call,
    CoreShape,
    Gradients,
    Launch,
    Plan,
    best_of,
    groups,
    merged_parts,
)
from mpo_kernels.planning.work import merge_work, time_of

# Library calls that take the host as long as one launch from triton.
STARTED = 2.5


def chain_problem(
    left: CoreShape, right: CoreShape, features: tuple[int, int], result: str, first: str
) -> Chain:
    """What a launch of the chain's kernels computes over ``left [1, i, j, D], right [D, i, j, 1]``.

    For a gradient the part asked for is the second one, and what is contracted first stands in
    the place of x.
    """
    left_first = first == "left" if result in ("y", "dx") else result == "right"
    a, b = (left, right) if left_first else (right, left)
    p = Chain(*a[1:3], *b[1:3], left[3], *features, first_minor=not left_first)
    return exchanged_chain(p) if result == "dx" or first == "dy" else p


def exchanged_chain(p: Chain) -> Chain:
    """The same chain with in and out exchanged."""
    return Chain(
        p.first_out,
        p.first_in,
        p.second_out,
        p.second_in,
        p.rank,
        p.out_features,
        p.in_features,
        p.first_minor,
        not p.exchanged,
    )


def plan_fused(call: Call, figures: DeviceFigures, limits: Limits) -> Plan:
    """The fastest of the library's plans and the kernels' own, on a device of these figures."""
    return _plan(call.bucketed, figures, limits)


@lru_cache(maxsize=4096)
def _plan(call: Call, figures: DeviceFigures, limits: Limits) -> Plan:
    shapes, rows, dtype, gradients = call.shapes, call.rows, call.dtype, call.gradients
    digits = dtype in panels.DTYPES
    plans = list(plan_library(call, figures, digits).candidates)
    for k in range(1, len(shapes)):
        if not (parts := merged_parts(shapes, (k,))):
            continue
        results = _results(gradients, k)
        choices = [
            c for result in results if (c := _choice(parts[0], parts[1], call, limits, result))
        ]
        if len(choices) < len(results):
            continue
        merging = merge_work(shapes, (k,), dtype.itemsize, gradients, digits)
        fixed = sum(w.macs for w in merging)
        kernels = sum(choice.seconds + figures.launch_seconds for choice in choices)
        seconds = time_of(merging, figures, kernels, STARTED * len(choices))
        moved = dtype.itemsize * (rows * sum(call.features) + sum(map(math.prod, parts)))
        first = choices[0].launch
        plans.append(
            Plan(
                algorithm="fused",
                order=first.first,
                split=(k,),
                rows=rows,
                block=first.tile[0],
                macs=sum(c.macs for c in choices) + fixed,
                bytes=moved + sum(w.bytes for w in merging),
                predicted_us=seconds * 1e6,
                measured_us=1e6 * sum(c.seconds for c in choices)
                if all(c.measured for c in choices)
                else None,
                launches=tuple(choice.launch for choice in choices),
                fixed_macs=fixed,
            )
        )
    return best_of(plans)


def _results(gradients: Gradients | None, split: int) -> list[str]:
    """What the launches of a plan must give."""
    if gradients is None:
        return ["y"]
    left, right = (any(gradients.cores[a:b]) for a, b in groups((split,), len(gradients.cores)))
    return ["dx"] * gradients.x + ["left"] * left + ["right"] * right


class _Choice(NamedTuple):
    seconds: float
    measured: bool
    macs: int
    launch: Launch


def _choice(
    left: CoreShape, right: CoreShape, call: Call, limits: Limits, result: str
) -> _Choice | None:
    """The fastest launch that forms a result, None where no kernel does."""
    of_rows = result in ("y", "dx")
    kernels = ("chain", "matrix") if of_rows else ("matrix_gradient",)
    ways = []
    for first, kernel in product(("left", "right") if of_rows else ("x", "dy"), kernels):
        p = chain_problem(left, right, call.features, result, first)
        macs = call.rows * p.rank * p.second_in * p.first_out * (p.first_in + p.second_out)
        if best := tuning.best(kernel, p, call.rows, call.dtype, limits):
            launch = Launch(result, first, best.tile, p)
            ways.append(_Choice(best.seconds, best.measured, macs, launch))
    return min(ways, default=None)
