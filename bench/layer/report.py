"""Markdown from results: ``python -m bench.layer.report FILE [--output FILE]``."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.layer import goals
from bench.layer.ways import ALL_WAYS, OTHER_MPO_WAYS
from bench.results import Record, load

# Points listed in each table of the worst, and at each goal.
_WORST, _OFFENDERS = 12, 3
_FIGURE = re.compile(r"-?[\d.]+(e-\d+)?( \w+| (/|of|±) [\d.]+(e-\d+)?)?|–")


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A markdown table, its columns of figures to the right."""
    lines = list(lines)
    if not lines:
        return "None."
    figures = [all(map(_FIGURE.fullmatch, column)) for column in zip(*lines, strict=True)]
    rule = ["---:" if right else "---" for right in figures]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *lines))


def _number(value: float | None, unit: float = 1.0) -> str:
    """Three significant digits; a dash where nothing was measured."""
    if value is None:
        return "–"
    value *= unit
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{min(digits, 3)}f}"


def _bytes(record: Record, way: str, kind: str) -> str:
    return _number(record["ways"].get(way, {}).get(f"{kind}_bytes"), 2**-20)


def _place(record: Record) -> str:
    rows = "1 row" if record["rows"] == 1 else f"{record['rows']} rows"
    return f"{record['size']} {record['factorisation']}, {rows}, {record['pass']}"


def conditions_table(conditions: dict[str, Any]) -> str:
    """Machine, versions, commit and the roofline that the figures hold for."""
    machine, git, roofline = (conditions[key] for key in ("machine", "git", "roofline"))
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
    where += f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    if "gpu" in machine:
        where += f"; {machine['gpu']}, {machine['gpu_memory_bytes'] / 2**30:.0f} GiB"
    dirty = " with uncommitted changes" if git["dirty"] else ""
    limits = f"{roofline['macs_per_second'] / 1e9:.0f} G multiply-adds/s in a GEMM of "
    limits += f"{roofline['gemm_size']}³, {roofline['bytes_per_second'] / 1e9:.1f} GB/s in a copy"
    return table(
        ("", "conditions"),
        [
            ("machine", where),
            ("device, dtype", f"{conditions['device']}, {conditions['dtype']}"),
            ("measured limits", limits),
            ("versions", versions),
            ("commit", f"{git['commit']}{dirty}"),
            ("date, command", f"{conditions['date']}, `{conditions['command']}`"),
        ],
    )


def goals_table(records: Sequence[Record], device: str) -> str:
    """Every goal: its limit, how many points miss it, and the worst of all."""
    lines = []
    for verdict in goals.evaluate(records, device):
        missed, points = len(verdict.offenders), verdict.points
        status = "not measured" if not points else "FAIL" if missed else "pass"
        # The worst point, or the worst few of those that miss.
        shown = verdict.offenders[:_OFFENDERS] or points[:1]
        worst = "; ".join(f"{_number(figure)} {_place(record)}" for figure, record in shown)
        count = f"{missed} of {len(points)}"
        lines.append((verdict.goal.text, _number(verdict.goal.limit), status, count, worst or "–"))
    return table(("goal", "at most", "", "missed", "worst"), lines)


def size_table(records: Sequence[Record]) -> str:
    """One size and pass: time, its ratios, and memory."""
    lines = []
    for record in records:
        other = goals.fastest(record, OTHER_MPO_WAYS)
        lines.append(
            (
                record["factorisation"],
                str(record["rows"]),
                _number(goals.time_of(record, "ours"), 1e-3),
                _number(goals.ratio(record, "ours", "dense")),
                _number(goals.over_best_other(record)) + (f" {other[0]}" if other else ""),
                _number(goals.ratio(record, "ours", "lowrank")),
                _number(goals.over_floor(record)),
                *(
                    f"{_bytes(record, 'ours', kind)} / {_bytes(record, 'dense', kind)}"
                    for kind in ("peak", "saved_activations")
                ),
            )
        )
    head = ("factorisation", "rows", "ms", "÷ dense", "÷ best other MPO way", "÷ low rank")
    return table((*head, "÷ floor", "peak MiB, ours / dense", "saved MiB, ours / dense"), lines)


def every_way_table(records: Sequence[Record]) -> str:
    """Milliseconds of every way at every point."""
    lines, ways = [], [way for way in ALL_WAYS if any(way in r["ways"] for r in records)]
    for record in records:
        times = (_number(goals.time_of(record, way), 1e-3) for way in ways)
        lines.append((_place(record), *times, _number(record["floor_us"], 1e-3)))
    return table(("milliseconds", *ways, "floor"), lines)


def worst_table(records: Sequence[Record], others: Sequence[str]) -> str:
    """Where ours is slower than the fastest of some other ways, the worst points first."""
    points = []
    for record in records:
        ours, other = goals.time_of(record, "ours"), goals.fastest(record, others)
        if ours is not None and other is not None and ours > other[1]:
            points.append((ours / other[1], ours, other, record))
    points.sort(key=lambda point: -point[0])
    lines = [
        (_place(record), _number(ours, 1e-3), _number(us, 1e-3), name, _number(ratio))
        for ratio, ours, (name, us), record in points[:_WORST]
    ]
    head = (f"{len(points)} of {len(records)} points", "ours, ms", "fastest, ms", "of", "÷")
    return table(head, lines)


def planner_table(records: Sequence[Record]) -> str:
    """The choices that cost most against the best candidate."""
    checked = [record for record in records if "planner" in record]
    checked.sort(key=lambda record: -record["planner"]["chosen_over_best"])

    def described(plan: Record) -> str:
        split = ",".join(map(str, plan["split"]))
        return f"{plan['algorithm']} {plan['order']} ({split}) block {plan['block']}"

    lines = []
    for record in checked[:_WORST]:
        planner = record["planner"]
        chosen, best = planner["candidates"][0], planner["candidates"][planner["best"]]
        if chosen is not best:
            lines.append(
                (
                    _place(record),
                    f"{described(chosen)}, {_number(chosen['median_us'], 1e-3)} ms",
                    f"{described(best)}, {_number(best['median_us'], 1e-3)} ms",
                    _number(planner["chosen_over_best"]),
                )
            )
    return table(("where", "chosen", "fastest", "chosen ÷ fastest"), lines)


def not_timed(records: Sequence[Record]) -> str:
    """Ways that were skipped, failed or were wrong: how often, and the first of them."""
    found: dict[tuple[str, str], list[tuple[Record, str]]] = defaultdict(list)
    for record in records:
        for name, way in record["ways"].items():
            if way["status"] != "ok":
                found[name, way["status"]].append((record, way["reason"]))
    lines = [
        (name, status, str(len(points)), f"{_place(points[0][0])}: {points[0][1]}")
        for (name, status), points in found.items()
    ]
    return table(("way", "", "points", "the first"), lines)


def render(results: dict[str, Any], every_way: bool = False) -> str:
    """The whole report."""
    records = results["records"]
    parts = [
        "# Benchmark",
        conditions_table(results["conditions"]),
        "Medians of interleaved runs. Ratios are times over times: below 1, ours is faster. "
        "The floor is the larger of the plan's multiply-adds at the GEMM rate and x, y and the "
        "cores (and their gradients) moved once. Low rank has the same number of parameters "
        "but is another matrix. Memory: the most that lived at once beyond the arguments, and "
        "what is saved for backward beside the parameters.",
        "## Goals",
        goals_table(records, results["conditions"]["device"]),
        "## Where ours is slower than another MPO way",
        worst_table(records, OTHER_MPO_WAYS),
        "## Where ours is slower than dense",
        worst_table(records, ("dense",)),
        "## Where the planner could have chosen better",
        planner_table(records),
    ]

    def key(record: Record) -> tuple[str, str]:
        return record["size"], record["pass"]

    order = {place: index for index, place in enumerate(dict.fromkeys(map(key, records)))}
    for (size, name), group in groupby(sorted(records, key=lambda r: order[key(r)]), key):
        parts += [f"## {size}, {name}", size_table(list(group))]
    parts += ["## Not timed", not_timed(records)]
    if every_way:
        parts += ["## Every way", every_way_table(records)]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.layer.report", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, help="markdown file; by default stdout")
    parser.add_argument("--every-way", action="store_true", help="add a table of every way")
    options = parser.parse_args(arguments)
    try:
        text = render(load(options.results), options.every_way)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    if options.output:
        options.output.write_text(text)
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
