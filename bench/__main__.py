"""``python -m bench --output bench/results/cpu.json``: every case, every way, about 20 minutes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from bench import facts
from bench.layer import cases, goals, report
from bench.layer.measure import measure_roofline
from bench.layer.problem import Problem
from bench.layer.run import Settings, run_point
from bench.layer.ways import ALL_WAYS, SERVING
from bench.results import Record, Results

THREADS = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Seconds of samples a way, and in --quick.
BUDGET, QUICK_BUDGET, STACK_BUDGET = 0.3, 0.05, 0.01
# When decoding, layers one after the other, and what is held beside ours by each back end.
LAYERS, SERVED_BESIDE = 8, ("ours", "dense", "lowrank")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times ours against every other way to compute the same layer.",
        epilog="With no shapes, factorisations or rows: a selection that takes about 20 minutes "
        "on two CPU cores, or five on a large GPU. Naming any of them takes the whole product of "
        "the rest.",
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--shapes", nargs="+", default=(), metavar="IxJ")
    parser.add_argument("--factorisations", nargs="+", default=(), metavar="NAME")
    parser.add_argument("--rows", nargs="+", type=int, default=(), metavar="N")
    parser.add_argument("--ways", nargs="+", default=(), choices=list(ALL_WAYS), metavar="NAME")
    parser.add_argument("--passes", nargs="+", default=cases.PASSES, choices=cases.PASSES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--resume", action="store_true", help="keep the records already there")
    parser.add_argument(
        "--budget-minutes", type=float, default=float("inf"), metavar="N", help="stop after (none)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="short samples; with nothing named, a few cases within a minute",
    )
    parser.add_argument(
        "--decoding",
        action="store_true",
        help=f"few rows, in a stack of {LAYERS} layers, every back end and bytes too",
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device for --device cuda, found none")
    if any(rows < 1 for rows in options.rows):
        parser.error(f"expected --rows of at least 1, got {options.rows}")
    try:
        options.points = cases.select(
            options.shapes,
            options.factorisations,
            options.rows,
            cases.DECODING
            if options.decoding
            else cases.QUICK
            if options.quick
            else cases.GPU
            if options.device == "cuda"
            else cases.STANDARD,
        )
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    torch.set_num_threads(THREADS)
    roofline = measure_roofline(device, dtype)
    settings = Settings(
        device=device,
        dtype=dtype,
        ways=tuple(options.ways) or ((*SERVED_BESIDE, *SERVING) if options.decoding else ()),
        budget=STACK_BUDGET if options.decoding else QUICK_BUDGET if options.quick else BUDGET,
        layers=LAYERS if options.decoding else 1,
        roofline=roofline,
        # On a GPU the graphs of all ways live at once, each with its memory.
        memory_cap=facts.memory_bytes(device) // (len(ALL_WAYS) if options.device == "cuda" else 2),
    )
    conditions = facts.conditions(
        *("bench", arguments, device),
        device=options.device,
        dtype=options.dtype,
        budget_seconds=settings.budget,
        roofline=asdict(roofline),
    )
    try:
        results = Results(options.output, conditions, options.resume)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    points = [point for point in options.points if point[1] in options.passes]
    run(points, settings, results, 60 * options.budget_minutes)
    print(report.goals_table(results.records, options.device))
    verdicts = goals.evaluate(results.records, options.device)
    missed = [verdict for verdict in verdicts if verdict.offenders]
    print(f"\n{len(results.records)} points in {options.output.name}; {len(missed)} goals missed.")
    return 0


def run(points: Sequence[cases.Point], settings: Settings, results: Results, limit: float) -> None:
    """Measure the points that ``results`` lacks."""
    left = [point for point in points if not results.has(point[0].name, point[1])]
    end, problem = time.monotonic() + limit, None
    for number, (case, name) in enumerate(progress := tqdm(left, "points")):
        if time.monotonic() > end:
            progress.write(f"{len(left) - number} points left: out of time", file=sys.stderr)
            return
        if number == 0 or left[number - 1][0] != case:
            problem = Problem(case.shape, case.rows, settings.device, settings.dtype)
        assert problem is not None
        record = run_point(case, name, problem, settings)
        results.add(record)
        progress.write(f"{case.name} {name}: {_summary(record)}", file=sys.stderr)


def _summary(record: Record) -> str:
    return ", ".join(
        f"{name} {way['median_us'] / 1e3:.3g} ms"
        if "median_us" in way
        else f"{name} {way['reason']}"
        for name, way in record["ways"].items()
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
