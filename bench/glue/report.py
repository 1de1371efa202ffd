"""The GLUE table and its figures, of what `bench.glue.table` has measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench import drawing
from bench.glue.methods import METHODS
from bench.layer.report import table
from mpop.data.glue import get_task

Row = dict[str, Any]

# Its dev rows contradict its training rows, so that what has learnt more does worse; the paper of
# BERT leaves it out as well.
_NOT_IN_MEAN = "wnli"
# The methods that the figure shows: name, the side it stands on, marker and colour.
_OURS, _THEIRS = drawing.COLOURS[:2]
_FRONT = {
    "dense": ("dense, all trained", "left", "D", drawing.TEXT),
    "lora": ("LoRA, {:.1f} M trained", "left", "s", _THEIRS),
    "light-encoder": ("light, {:.1f} M trained", "left", "o", _OURS),
    "chosen": ("half: chosen", "right", "o", _OURS),
    "aware-svd": ("half: activation-aware SVD", "right", "s", _THEIRS),
    "svd": ("half: plain SVD", "right", "s", _THEIRS),
    "chosen-quarter": ("a quarter: chosen", "right", "o", _OURS),
    "aware-svd-quarter": ("a quarter:\nactivation-aware SVD", "right", "s", _THEIRS),
    "squeezed": ("squeezed", "right", "o", _OURS),
}


def figures(rows: Sequence[Row], rounds: Sequence[Row], folder: Path) -> None:
    """`table.svg` of the methods that it shows, `tasks.svg` of all, `trace.svg` of the rounds."""
    if shown := [row for row in _means(rows) if row["method"] in _FRONT]:
        _front(shown, folder / "table.svg")
    if rows:
        _tasks(rows, folder / "tasks.svg")
    if rounds:
        _trace(rounds, folder / "trace.svg")


def _front(rows: Sequence[Row], path: Path) -> None:
    """Metric against parameters, averaged over the tasks; bars are standard deviations."""
    with drawing.figure(path, 8, 4.6) as drawn:
        axes = drawn.subplots()
        marks = []
        for row in rows:
            name, side, marker, colour = _FRONT[row["method"]]
            x, y = row["total_parameters"] / 1e6, 100 * row["mean"]
            axes.errorbar(x, y, 100 * row["sd"], fmt=marker, color=colour, markersize=8)
            name = name.format(row["trainable_parameters"] / 1e6)
            marks.append(drawing.Mark(x, y, name, side))
        axes.set(xlabel="parameters of the model, millions", ylabel="mean over the tasks, % on dev")
        drawing.name(axes, marks)


def _tasks(rows: Sequence[Row], path: Path) -> None:
    """Every method, a line each, and a panel a task; dense's mean goes through all of them."""
    panels = {"mean": _means(rows), **_by_task(rows)}
    panels = {name: of_task for name, of_task in panels.items() if of_task}
    names = [name for name in METHODS if any(row["method"] == name for row in rows)]
    with drawing.figure(path, 2 + 1.8 * len(panels), 1 + 0.26 * len(names)) as drawn:
        all_axes = drawn.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (task, of_task) in zip(all_axes, panels.items(), strict=True):
            for row in of_task:
                x, y = 100 * row["mean"], names.index(row["method"])
                bar = 100 * (row["sd"] or 0)
                axes.errorbar(x, y, xerr=bar, fmt="o", color=_OURS, markersize=6)
                if row["method"] == "dense":
                    axes.axvline(x, color=drawing.TEXT, linestyle=":")
            metric = of_task[0].get("metric", "").replace("_correlation", "")
            title = task if task == "mean" else get_task(task).folder
            axes.set(title=title, xlabel=f"{metric} %".strip())
        all_axes[0].set_yticks(range(len(names)), names)
        all_axes[0].invert_yaxis()


def _trace(rounds: Sequence[Row], path: Path) -> None:
    """Metric on held-out rows against parameters, round by round, a line a seed."""
    by_task = _by_task(rounds)
    with drawing.figure(path, 1 + 2.6 * len(by_task), 3.2) as drawn:
        panels = drawn.subplots(1, len(by_task), squeeze=False)[0]
        for panel, (task, of_task) in zip(panels, by_task.items(), strict=True):
            for seed, group in groupby(of_task, key=lambda each: each["seed"]):
                of_one = list(group)
                for is_kept, line in ((True, "o-"), (False, "x")):
                    points = [
                        (each["parameters"] / 1e6, 100 * each["metric"])
                        for each in of_one
                        if each["kept"] == is_kept and each["metric"] is not None
                    ]
                    xs, ys = [x for x, _ in points], [y for _, y in points]
                    colour = drawing.COLOURS[seed % len(drawing.COLOURS)]
                    panel.plot(xs, ys, line, color=colour, markersize=5)
            panel.invert_xaxis()
            panel.set(title=get_task(task).folder, xlabel="parameters, millions")
        panels[0].set_ylabel("% on held-out rows")
        drawn.suptitle("A line a seed, × a round that was undone", fontsize="medium")


def markdown(rows: Sequence[Row], times: dict[str, Row], conditions: dict[str, Any]) -> str:
    """The table with a caption that says what it was measured on."""
    by_task = _by_task(rows)
    methods = [name for name in METHODS if any(row["method"] == name for row in rows)]
    cells = {(row["method"], row["task"]): row for row in rows}
    means = {row["method"]: row["mean"] for row in _means(rows)}
    head = (
        "method",
        *(get_task(name).folder for name in by_task),
        *("mean", "#Pr", "#To", "on disk", "a step", "its memory", "latency"),
    )
    lines = []
    for method in methods:
        of_method = [cells.get((method, task)) for task in by_task]
        # As the mean: what a method chooses differs from task to task.
        found = [row for row in of_method if row and row["task"] != _NOT_IN_MEAN]
        found = found or [row for row in of_method if row]
        lines.append(
            (
                f"`{method}`",
                *map(value_of, of_method),
                f"{100 * means[method]:.1f}" if method in means else "–",
                f"{_mean(found, 'trainable_parameters') / 1e6:.2f} M",
                f"{_mean(found, 'total_parameters') / 1e6:.2f} M",
                f"{_mean(found, 'disk_bytes') / 1e6:.0f} MB",
                *cost_of(times.get(method)),
            )
        )
    what = [f"- `{name}`: {METHODS[name].what}." for name in methods]
    parts = [
        table(head, lines),
        "\n".join(what),
        caption(by_task, times, conditions),
        rates(methods, cells, conditions["grid_tasks"]),
        f"`{conditions['command']}`",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def caption(
    by_task: dict[str, list[Row]], times: dict[str, Row], conditions: dict[str, Any]
) -> str:
    """Under which conditions all of it was measured."""
    versions = conditions["versions"]
    timed = {f"{row['threads']} threads of {row['machine']}": None for row in times.values()}
    git = conditions["git"]
    commit = (git["commit"] or "none")[:12] + (" with changes" * git["dirty"])
    sizes = []
    for task, rows in by_task.items():
        row = rows[0]
        counts = sorted({len(row["seeds"]) for row in rows})
        seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        size = f"{row['train_samples']:,} / {row['eval_samples']:,}"
        sizes.append(
            f"{get_task(task).folder} ({row['metric']}) {size}, "
            f"{row['epochs']:g} epoch{'s' * (row['epochs'] != 1)}, "
            f"{seeds} seed{'s' * (counts[-1] != 1)}"
        )
    return (
        f"{conditions['model']}: mean ± standard deviation over seeds, in percent, on dev"
        f"{'; the mean and the sizes leave out WNLI' * (_NOT_IN_MEAN in by_task)}. "
        f"Train / dev rows: {'; '.join(sizes)}. What is cut has nine tenths of its steps before "
        "the cut and one after (`svd`, `dir`: two thirds and one), except `squeezed`, which has up "
        f"to 10 rounds of 20 steps instead. Batch {conditions['batch_size']}, length "
        f"{conditions['max_length']}, {conditions['precision']}. #Pr trained and #To all "
        "parameters. Calibration draws from all training rows, without their labels. A step of 32 "
        "texts of 64 tokens, the peak memory of the process (the device's on a GPU) after it, and "
        "the latency of one text are medians, with nothing else running"
        f"{', '.join(['', *timed])}. Runs on {', '.join(conditions['machines'])}; "
        f"torch {versions['torch']}, transformers {versions['transformers']}, "
        f"peft {versions['peft']}; commit {commit}."
    )


def rates(
    methods: Sequence[str], cells: dict[tuple[str, str], Row], grid_tasks: dict[str, str]
) -> str:
    """The learning rates, a column for the tasks that share them."""
    groups: dict[str, list[str]] = {}
    for task, spokesman in grid_tasks.items():
        groups.setdefault(spokesman, []).append(task)
    if not methods:
        return ""
    lines = []
    for method in methods:
        found = [
            next((cells[method, task] for task in tasks if (method, task) in cells), None)
            for tasks in groups.values()
        ]
        lines.append((f"`{method}`", *map(rates_of, found)))
    heads = [", ".join(get_task(task).folder for task in tasks) for tasks in groups.values()]
    judges = ", ".join(get_task(task).folder for task in groups)
    return (
        "Learning rates (of what is cut: before the cut, which is dense's, and after it), chosen "
        f"with the first seed on held-out training rows of {judges}, where several were tried:\n\n"
    ) + table(("rates of", *heads), lines)


def _by_task(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["task"], []).append(row)
    return found


def _mean(rows: Sequence[Row], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


def _means(rows: Sequence[Row]) -> list[Row]:
    """One row a method that has every task; seeds are drawn for each task by itself."""
    rows = [row for row in rows if row["task"] != _NOT_IN_MEAN]
    tasks = {row["task"] for row in rows}
    found = []
    for method in METHODS:
        of_method = [row for row in rows if row["method"] == method]
        if tasks and len(of_method) == len(tasks):
            sd = sum((row["sd"] or 0) ** 2 for row in of_method) ** 0.5 / len(tasks)
            names = ("mean", "trainable_parameters", "total_parameters")
            averages = {name: _mean(of_method, name) for name in names}
            found.append({"method": method, "sd": sd, **averages})
    return found


def rates_of(row: Row | None) -> str:
    """A cell of the rates, and how many were tried there."""
    if row is None:
        return "–"
    written = " / ".join(f"{rate:g}" for rate in dict.fromkeys(row["rates"]))
    return written + (f" ({row['tried']} tried)" if row["tried"] else "")


def value_of(row: Row | None) -> str:
    """A cell of the metric."""
    if row is None:
        return "–"
    return f"{100 * row['mean']:.1f}" + ("" if row["sd"] is None else f" ± {100 * row['sd']:.1f}")


def cost_of(times: Row | None) -> tuple[str, str, str]:
    """The cells of what a method costs."""
    if times is None:
        return "–", "–", "–"
    return (
        f"{1e3 * times['step_seconds']:.0f} ms",
        f"{times['peak_memory_bytes'] / 2**20:.0f} MiB",
        f"{1e3 * times['latency_seconds']:.1f} ms",
    )
