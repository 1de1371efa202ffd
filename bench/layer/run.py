"""One point of the benchmark: a case and a pass, every way to compute it, measured together."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from bench.layer.cases import COMPILED, Case
from bench.layer.measure import Roofline, host_microseconds, interleave
from bench.layer.problem import TOLERANCE, Problem, Step
from bench.layer.ways import ALL_WAYS, WAYS, Way, estimate
from bench.results import Record
from mpo_kernels import Plan, backends
from mpo_kernels.planning.plan import Gradients

# A baseline whose call takes longer, and this many times dense's floor, is not timed.
SLOW_SECONDS, SLOW_FACTOR = 1.5, 8.0
COMPILE_CAP_SECONDS = 60.0
# The planner's candidates that are timed: those predicted within this factor of the chosen.
CANDIDATE_SPAN = 4.0
# Of those, as many of the fastest are timed a second time, against the chosen.
FINALISTS = 3


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run.

    Attributes:
        ways: names of :data:`ALL_WAYS`; empty for :data:`WAYS`, with ``compiled`` where the
            registry says.
        budget: seconds of samples a way, where three calls do not take longer.
        memory_cap: bytes beyond which a way is skipped.
        layers: one after the other, each with cores of its own, which are read for the first time;
            what is timed is divided by so many. Of more than one the planner is not checked.
    """

    device: torch.device
    dtype: torch.dtype
    ways: tuple[str, ...]
    budget: float
    roofline: Roofline
    memory_cap: int
    layers: int = 1

    def ways_of(self, case: Case) -> list[Way]:
        compiled = (case.size, case.factorisation) in COMPILED
        names = self.ways or [n for n in WAYS if n != "compiled" or compiled]
        return [ALL_WAYS[name] for name in names]


def run_point(case: Case, name: str, problem: Problem, settings: Settings) -> Record:
    """Check, measure and time every way at one case in pass ``name``."""
    shape, training = problem.shape, name != "forward"
    slow = _slow_seconds(problem, training, settings)
    ways: dict[str, Record] = {}
    stacks: dict[str, list[Step]] = {}
    for way in settings.ways_of(case):
        if reason := _too_much(way, problem, training, slow, settings):
            ways[way.name] = {"status": "skipped", "reason": reason}
            continue
        try:
            step = Step(way, problem, name)
            ways[way.name] = _prepared(step, slow)
        except Exception as error:
            # One way that cannot run must not end the run: its own words are the result.
            words = f"{type(error).__name__}: {error}".split("\n")[0]
            ways[way.name] = {"status": "failed", "reason": words[:160]}
            continue
        if ways[way.name]["status"] == "ok":
            more = (Step(way, problem.twin(), name) for _ in range(settings.layers - 1))
            stacks[way.name] = [step, *more]
    calls = {way_name: partial(_in_turn, steps) for way_name, steps in stacks.items()}
    for way_name, timing in interleave(calls, settings.budget, settings.device).items():
        ways[way_name] |= asdict(timing.divided(settings.layers))
        if settings.device.type == "cuda":
            host = host_microseconds(stacks[way_name][0], settings.device)
            ways[way_name]["host_us"] = round(host, 2)
    record: Record = {
        "case": case.name,
        "size": case.size,
        "factorisation": case.factorisation,
        "rows": case.rows,
        "pass": name,
        "layers": settings.layers,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "shape": shape.to_dict(),
        "parameters": shape.num_parameters,
        "core_bytes": shape.num_parameters * settings.dtype.itemsize,
        "ways": ways,
    }
    plans = _plans(problem, name)
    record |= _floors(problem, plans, name, settings.roofline)
    record["plan"] = {kind: _described(plan) for kind, plan in plans.items()}
    if "ours" in calls and settings.layers == 1:
        record["planner"] = _planner_check(problem, plans, name, settings)
    return record


def _in_turn(steps: Sequence[Step]) -> None:
    for step in steps:
        step()


def _slow_seconds(problem: Problem, training: bool, settings: Settings) -> float:
    dense = estimate(WAYS["dense"], problem.shape, problem.rows, problem.dtype.itemsize, training)
    floor = 1e-6 * settings.roofline.floor_us(dense.macs, dense.bytes)
    return max(SLOW_SECONDS, SLOW_FACTOR * floor)


def _too_much(
    way: Way, problem: Problem, training: bool, slow: float, settings: Settings
) -> str | None:
    """Why a way is not tried, from its estimated needs."""
    needs = estimate(way, problem.shape, problem.rows, problem.dtype.itemsize, training)
    if needs.bytes > settings.memory_cap:
        return f"needs {needs.bytes / 2**30:.0f} GiB"
    seconds = 1e-6 * settings.roofline.floor_us(needs.macs, 2 * needs.bytes)
    return f"needs about {seconds:.0f} s a call" if way.path and seconds > slow else None


def _prepared(step: Step, slow: float) -> Record:
    """Compile a step where it compiles, check it and leave it warm: its record so far."""
    record: Record = {"status": "ok"}
    if step.way.name == "compiled":
        start = time.perf_counter()
        with _time_limit(COMPILE_CAP_SECONDS):
            step()
        record["compile_seconds"] = round(time.perf_counter() - start, 2)
    if step.problem.device.type == "cuda":
        step()  # what is compiled or tuned in a first call is no memory of the way's
    start = time.perf_counter()
    error, memory = step.checked()
    seconds = time.perf_counter() - start
    record |= {"error": error, **{f"{k}_bytes": v for k, v in asdict(memory).items()}}
    # Not error > …: a NaN is wrong too.
    bound = max(TOLERANCE[step.problem.dtype], step.way.tolerance)
    if error is not None and not error <= bound:
        return record | {"status": "wrong", "reason": f"relative error {error:.0e}"}
    if step.way.path and seconds > slow:
        return record | {"status": "skipped", "reason": f"took {seconds:.1f} s in its first call"}
    return record


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def expired(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds:.0f} s to compile")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _gradients(problem: Problem, name: str) -> Gradients:
    frozen = problem.shape.central if name == "light" else None
    return Gradients(True, tuple(k != frozen for k in range(problem.shape.num_cores)))


def _plans(problem: Problem, name: str) -> dict[str, Plan]:
    """The plans chosen: of the forward pass and, in training, of the backward pass."""
    plan = partial(
        backends.selected(problem.x).plan_for,
        problem.rows,
        problem.dtype,
        problem.device,
        problem.cores,
        features=(problem.shape.in_features, problem.shape.out_features),
    )
    plans = {"forward": plan()}
    if name != "forward":
        plans["backward"] = plan(_gradients(problem, name))
    return plans


def _described(plan: Plan) -> Record:
    fields = ("algorithm", "order", "split", "block", "macs", "predicted_us")
    return {field: getattr(plan, field) for field in fields}


def _floors(
    problem: Problem, plans: dict[str, Plan], name: str, roofline: Roofline
) -> dict[str, float]:
    """Microseconds that the MACs of the plan, or what must be read and written once, need.

    That is x, y, the cores and, in training, the gradient of each but a frozen core. Dense's too.
    """
    shape, rows, itemsize = problem.shape, problem.rows, problem.dtype.itemsize
    x_y = rows * (shape.in_features + shape.out_features)
    formed = dense_formed = 0
    if name != "forward":
        sizes = map(math.prod, shape.core_shapes)
        needs = _gradients(problem, name).cores
        formed = x_y + sum(size for size, need in zip(sizes, needs, strict=True) if need)
        dense_formed = x_y + shape.dense_parameters
    passes = 1 if name == "forward" else 3
    macs = sum(plan.macs for plan in plans.values())
    return {
        "floor_us": roofline.floor_us(macs, itemsize * (x_y + shape.num_parameters + formed)),
        "dense_floor_us": roofline.floor_us(
            passes * rows * shape.dense_parameters,
            itemsize * (x_y + shape.dense_parameters + dense_formed),
        ),
    }


def _planner_check(
    problem: Problem, plans: dict[str, Plan], name: str, settings: Settings
) -> Record:
    """The candidates near the chosen plan, timed: is the choice the fastest?

    All are screened once; the chosen and the fastest few are then timed against each other, since
    the least of many noisy figures says little.
    """
    backend, gradients = backends.selected(problem.x), _gradients(problem, name)

    def call(plan: Plan) -> Callable[[], Any]:
        if name == "forward":
            out = problem.shape.out_features
            return partial(backend.linear, problem.x, problem.cores, problem.bias, out, plan)
        return partial(
            backend.linear_backward, problem.dy, problem.x, problem.cores, gradients, plan
        )

    chosen = plans.get("backward", plans["forward"])
    limit = CANDIDATE_SPAN * chosen.predicted_us
    near = [plan for plan in chosen.candidates if plan.predicted_us <= limit]
    calls = {index: call(plan) for index, plan in enumerate(near)}
    with torch.no_grad():
        screened = interleave(calls, settings.budget / 20, settings.device, min_repeats=1)
        fastest = sorted(calls, key=lambda index: screened[index].median_us)[:FINALISTS]
        # The chosen is the first candidate.
        finals = {index: calls[index] for index in {0, *fastest}}
        timed = interleave(finals, settings.budget, settings.device)
    best = min(timed, key=lambda index: timed[index].median_us)
    return {
        "chosen_over_best": timed[0].median_us / timed[best].median_us,
        "best": best,
        "candidates": [
            _described(plan) | {"median_us": (timed.get(i) or screened[i]).median_us}
            for i, plan in enumerate(near)
        ],
    }
