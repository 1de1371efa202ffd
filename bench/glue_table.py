"""Every method of `methods.py` on GLUE: `python -m bench.glue_table --data-dir D --output O`.

For each task and method the rates of a small grid are tried with one seed on training rows held
out; the best is then run with every seed and reported on dev. Each run is a process of its own
(`bench/methods.py`) and a line of `runs.jsonl` as soon as it ends; a run found there is not
repeated, so that an interrupted or out-of-budget bench continues where it stopped. With `--time`
what each method costs is measured at the end, with nothing beside it (`bench/times.py`). What there
is so far is summed up in `table.md`, and with its conditions in `table.json`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from math import isinf
from pathlib import Path
from typing import Any

import torch

from bench import facts
from bench.methods import METHODS
from mpop.demo import default_model
from mpop.glue import TASKS, get_task

GRID = {
    name: [(rate, rate) for rate in rates]
    for name, rates in {
        **dict.fromkeys(METHODS, (1e-4, 2e-4, 4e-4)),
        "full": (5e-5, 1e-4, 2e-4),
        "light": (1e-4, 2e-4, 5e-4),
        "light-encoder": (2e-4, 5e-4, 1e-3),
        "lora": (5e-4, 1e-3, 2e-3),
        "biases": (2e-3, 5e-3, 1e-2),
    }.items()
}
# What is cut has its dense steps at dense's rate, and those after the cut at a low one, all of it.
GRID |= {
    name: [(2e-4, 1e-4 if name in ("svd", "dir") else 2.5e-5)]
    for name, method in METHODS.items()
    if method.before
}
# Training rows of a model that is made for its times alone.
_FEW = 320
Rates = tuple[float, float]


class BudgetSpent(Exception):
    """The wall-clock budget is used up."""


@dataclass(frozen=True)
class Run:
    """One fine-tuning: two runs of equal fields are the same measurement."""

    task: str
    method: str
    seed: int
    eval_split: str
    rates: Rates
    epochs: float
    max_train_samples: int | None
    batch_size: int
    max_length: int
    precision: str
    model: str

    def command(self, keep: Path | None, **where: str | None) -> list[str]:
        """The process to start; among `where` is that of the model named in the fields."""
        options = asdict(self) | {
            "learning_rate": self.rates[0],
            "mpo_learning_rate": self.rates[1],
            "keep": keep and str(keep),
            **where,
        }
        del options["rates"]
        return [sys.executable, "-m", "bench.methods", json.dumps(options)]


class Bench:
    """The runs done so far, and the means to do another one within the budget."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.file = Path(options.output) / "runs.jsonl"
        self.deadline = time.monotonic() + 60 * options.budget_minutes
        self.results: dict[Run, dict[str, Any]] = {}
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        for record in map(json.loads, lines):
            run = Run(**{**record["run"], "rates": tuple(record["run"]["rates"])})
            if record["result"] is not None:
                self.results[run] = record["result"]

    def measure_run(self, run: Run) -> None:
        """Measure the run unless its result is known; a failure is written down and passed over.

        Raises:
            BudgetSpent: Before the run, or in the midst of it; it leaves nothing behind.
        """
        if run in self.results:
            return
        left = None if isinf(self.deadline) else self.deadline - time.monotonic()
        if left is not None and left <= 0:
            raise BudgetSpent
        say(f"{run.task} {run.method} seed {run.seed} rates {run.rates} on {run.eval_split}")
        done = self.start(run, self.kept(run), left)
        result = error = None
        if done.returncode == 0:
            result = json.loads(done.stdout.splitlines()[-1])
            result["model"] = run.model
            self.results[run] = result
            say(f"  {result['metric']} {result['value']:.4f}")
        else:
            error = (done.stderr.splitlines() or ["no message"])[-1]
            say(f"  failed: {error}")
        with self.file.open("a") as file:
            record = {"run": asdict(run), "result": result, "error": error}
            file.write(json.dumps(record) + "\n")

    def start(
        self, run: Run, keep: Path | None, seconds: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Do the run in a process of its own.

        Raises:
            BudgetSpent: It took longer.
        """
        with tempfile.TemporaryDirectory(prefix="glue-table-") as folder:
            options = self.options
            command = run.command(
                keep,
                model=options.model,
                data_dir=options.data_dir,
                output=f"{folder}/model",
                cache=options.cache,
            )
            try:
                return subprocess.run(command, capture_output=True, text=True, timeout=seconds)
            except subprocess.TimeoutExpired:
                raise BudgetSpent from None

    def kept(self, run: Run) -> Path | None:
        """The file for the run's model, of which times are measured: of one run a method."""
        options = self.options
        if (run.task, run.seed, run.eval_split) != (options.tasks[0], options.seeds[0], "dev"):
            return None
        Path(options.cache).mkdir(parents=True, exist_ok=True)
        return Path(options.cache) / f"{run.task}-{run.method}.pt"

    def time(self) -> None:
        """Measure what the methods cost, one at a time, and write `times.json`.

        Where no run of this bench has left its model, a run on a few rows makes one of its kind.
        """
        found = {}
        for run, grid in self.plan():
            chosen = self.chosen(run, grid)
            file = chosen and self.kept(chosen)
            if chosen is None or file is None:
                continue
            if not file.exists():
                self.start(replace(chosen, max_train_samples=_FEW), file).check_returncode()
            say(f"times of {run.method}")
            command = [sys.executable, "-m", "bench.times", str(file), run.precision]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[run.method] = json.loads(done.stdout.splitlines()[-1])
            self.times_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    @property
    def times_file(self) -> Path:
        return self.file.with_name("times.json")

    def plan(self) -> Iterator[tuple[Run, list[Rates]]]:
        """The first dev run of each task and method, without a rate yet, and its grid."""
        options = self.options
        for task in options.tasks:
            for method in options.methods:
                run = Run(
                    task=task,
                    method=method,
                    seed=options.seeds[0],
                    eval_split="dev",
                    rates=(0.0, 0.0),
                    epochs=options.epochs[task],
                    max_train_samples=options.max_train_samples[task],
                    batch_size=options.batch_size,
                    max_length=options.max_length,
                    precision=options.precision,
                    model=options.model_name,
                )
                yield run, options.grid[method]

    def chosen(self, run: Run, grid: list[Rates]) -> Run | None:
        """`run` at the rate that did best on the held-out rows; None if none has ended well."""
        if len(grid) == 1:
            return replace(run, rates=grid[0])
        known = [trial for trial in self.trials(run, grid) if trial in self.results]
        if not known:
            return None

        def quality(trial: Run) -> tuple[float, float]:
            # A metric of zero, as Matthews' before anything is learnt, says nothing: the loss does.
            result = self.results[trial]
            last = [loss for _, loss in result["losses"]][-5:]
            return result["value"], -statistics.fmean(last)

        return replace(run, rates=max(known, key=quality).rates)

    def trials(self, run: Run, grid: list[Rates]) -> list[Run]:
        """`run` at every rate, on fewer rows where so asked, judged on training rows held out.

        On its own task, or on the one that speaks for all.
        """
        task = self.options.grid_task or run.task
        sizes = [self.options.max_train_samples[task], self.options.grid_train_samples[task]]
        trial = replace(
            run,
            task=task,
            epochs=self.options.epochs[task],
            eval_split="train-holdout",
            max_train_samples=min((size for size in sizes if size), default=None),
        )
        return [replace(trial, rates=rates) for rates in grid]

    def measure(self) -> None:
        """All grids, then all tasks and methods seed by seed, so that a budget cuts seeds first."""
        for run, grid in self.plan():
            if len(grid) > 1:
                for trial in self.trials(run, grid):
                    self.measure_run(trial)
        for seed in self.options.seeds:
            for run, grid in self.plan():
                if chosen := self.chosen(run, grid):
                    self.measure_run(replace(chosen, seed=seed))

    def rows(self) -> list[dict[str, Any]]:
        """One row a task and method, over the seeds that are there."""
        rows = []
        for run, grid in self.plan():
            if chosen := self.chosen(run, grid):
                runs = [replace(chosen, seed=seed) for seed in self.options.seeds]
                if done := {run.seed: self.results[run] for run in runs if run in self.results}:
                    rows.append(summary(chosen, done))
        return rows

    def rounds(self) -> list[dict[str, Any]]:
        """Every round of every squeeze, with its task and seed."""
        found = []
        for run, grid in self.plan():
            for seed in self.options.seeds:
                chosen = self.chosen(run, grid)
                result = chosen and self.results.get(replace(chosen, seed=seed))
                made = (result or {}).get("rounds", [])
                found += [{"task": run.task, "seed": seed, **each} for each in made]
        return found

    def times(self) -> dict[str, dict[str, Any]]:
        """By method, as they were last measured."""
        return json.loads(self.times_file.read_text()) if self.times_file.exists() else {}


def summary(run: Run, seeds: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds; parameters and size as means."""
    results = list(seeds.values())
    values = [result["value"] for result in results]
    first = results[0]
    return {
        "task": run.task,
        "method": run.method,
        "metric": first["metric"],
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": list(seeds),
        "rates": run.rates,
        **{
            name: statistics.fmean(result[name] for result in results)
            for name in ("trainable_parameters", "total_parameters", "disk_bytes")
        },
        "train_samples": first["train_samples"],
        "eval_samples": first["eval_samples"],
        "epochs": run.epochs,
    }


def figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Metric against parameters, a panel a task, a colour a method; bars are one sd."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    drawn = Figure(figsize=(1 + 4.5 * len(tasks), 5.2), layout="constrained")
    colours = {name: f"C{k % 10}" for k, name in enumerate(METHODS)}
    for panel, task in zip(drawn.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for row in rows:
            if row["task"] == task:
                name = row["method"]
                panel.errorbar(
                    row["total_parameters"] / 1e6,
                    100 * row["mean"],
                    100 * (row["sd"] or 0),
                    fmt="os^D"[list(METHODS).index(name) // 10],
                    color=colours[name],
                    label=f"{name} ({row['trainable_parameters'] / 1e6:.2f} M trained)",
                )
        panel.set(title=task, xlabel="parameters, millions", ylabel="metric on dev, %")
        panel.legend(fontsize=6, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    drawn.savefig(path, dpi=150)


def trace(rounds: Sequence[dict[str, Any]], path: Path) -> None:
    """Metric on held-out rows against parameters, round by round, a line a squeeze."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6, 4), layout="constrained")
    panel = drawn.subplots()
    squeezes = dict.fromkeys((each["task"], each["seed"]) for each in rounds)
    for k, (task, seed) in enumerate(squeezes):
        of_one = [each for each in rounds if (each["task"], each["seed"]) == (task, seed)]
        for is_kept, style in ((True, "o-"), (False, "x")):
            points = [
                (each["parameters"] / 1e6, 100 * each["metric"])
                for each in of_one
                if each["kept"] == is_kept and each["metric"] is not None
            ]
            label = f"{task}, seed {seed}" if is_kept else None
            xs, ys = [x for x, _ in points], [y for _, y in points]
            panel.plot(xs, ys, style, color=f"C{k}", label=label)
    panel.invert_xaxis()
    panel.set(xlabel="parameters, millions", ylabel="metric on held-out rows, % (×: undone)")
    panel.legend()
    drawn.savefig(path, dpi=150)


def markdown(
    rows: Sequence[dict[str, Any]], times: dict[str, dict[str, Any]], conditions: dict[str, Any]
) -> str:
    """The table with a caption that says what it was measured on."""
    tasks = {row["task"]: row for row in rows}
    methods = [name for name in METHODS if any(row["method"] == name for row in rows)]
    columns = (
        "method",
        *(get_task(name).folder for name in tasks),
        *("mean", "#Pr", "#To", "on disk", "a step", "its memory", "latency"),
    )
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for method in methods:
        of_task = {row["task"]: row for row in rows if row["method"] == method}
        found = of_task.values()
        is_whole = len(found) == len(tasks)
        mean = f"{100 * statistics.fmean(row['mean'] for row in found):.1f}" if is_whole else "–"

        def average(name: str, found: Any = found) -> float:
            return statistics.fmean(row[name] for row in found) / 1e6

        cells = (
            f"`{method}`",
            *(value_of(of_task.get(task)) for task in tasks),
            mean,
            f"{average('trainable_parameters'):.2f} M",
            f"{average('total_parameters'):.2f} M",
            f"{average('disk_bytes'):.0f} MB",
            *cost_of(times.get(method)),
        )
        lines.append("| " + " | ".join(cells) + " |")
    machine, versions = conditions["machine"], conditions["versions"]
    commit = (conditions["commit"] or "none")[:12] + (" with changes" * conditions["dirty"])
    sizes = ", ".join(
        f"{get_task(name).folder} {row['train_samples']:,} / {row['eval_samples']:,}, "
        f"{row['epochs']:g} epoch" + "s" * (row["epochs"] != 1)
        for name, row in tasks.items()
    )
    metrics = "; ".join(f"{get_task(n).folder} {row['metric']}" for n, row in tasks.items())
    rates = dict.fromkeys(
        f"`{row['method']}` {' / '.join(f'{rate:g}' for rate in dict.fromkeys(row['rates']))}"
        for row in rows
    )
    counts = {len(row["seeds"]) for row in rows}
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)}))) if counts else "no"
    grid_task = conditions["grid_task"]
    tried = f"rows of {get_task(grid_task).folder}, for all tasks" if grid_task else "rows"
    threads = f"{machine['threads']} threads"
    lines += ["", *(f"- `{name}`: {METHODS[name].what}." for name in methods)]
    lines += [
        "",
        f"{conditions['model']}: mean ± standard deviation over {seeds} seeds, in percent, on dev "
        f"({metrics}). Train / dev rows: {sizes}. What is cut has nine tenths of its steps before "
        "the cut and one after (`svd`, `dir`: two thirds and one), except `squeezed`, which has up "
        "to 10 rounds of 20 steps instead. "
        f"Batch {conditions['batch_size']}, length {conditions['max_length']}, "
        f"{conditions['precision']}. #Pr trained and #To all parameters. "
        f"Rates (of what is cut: before and after it): {', '.join(rates)}; chosen with seed "
        f"{conditions['seeds'][0]} on held-out training {tried}, where there was a choice. "
        "Calibration draws from all training rows, without their labels. A step of 32 texts of 64 "
        "tokens, the peak memory of the process (the device's on a GPU) after it, and the latency "
        f"of one text are medians, with nothing else running, {threads}. "
        f"{machine.get('gpu', machine['cpu'])}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}, peft {versions['peft']}; commit {commit}.",
        "",
        f"`{conditions['command']}`",
    ]
    return "\n".join(lines) + "\n"


def value_of(row: dict[str, Any] | None) -> str:
    """A cell of the metric."""
    if row is None:
        return "–"
    return f"{100 * row['mean']:.1f}" + ("" if row["sd"] is None else f" ± {100 * row['sd']:.1f}")


def cost_of(times: dict[str, Any] | None) -> tuple[str, str, str]:
    """The cells of what a method costs."""
    if times is None:
        return "–", "–", "–"
    return (
        f"{1e3 * times['step_seconds']:.0f} ms",
        f"{times['peak_memory_bytes'] / 2**20:.0f} MiB",
        f"{1e3 * times['latency_seconds']:.1f} ms",
    )


def conditions_of(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """What the figures hold for; of absolute paths only the last part is kept."""
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in argv]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = ("transformers", "accelerate", "datasets", "peft")
    return {
        "command": shlex.join(["python", "-m", "bench.glue_table", *arguments]),
        "model": options.model_name,
        "seeds": options.seeds,
        "grid_task": options.grid_task,
        "grid_train_samples": options.grid_train_samples,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "precision": options.precision,
        "machine": facts.machine(device),
        "versions": facts.versions() | {name: metadata.version(name) for name in names},
        **facts.commit(),
    }


def say(text: str) -> None:
    """A line of progress."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def by_task(kind: Callable[[str], Any], default: Any, given: Sequence[str]) -> dict[str, Any]:
    """`["3", "rte=10"]`: 3 for every task, 10 for RTE."""
    values = dict.fromkeys(TASKS, default)
    for part in sorted(given, key=lambda part: "=" in part):
        name, is_one, value = part.rpartition("=")
        tasks = [get_task(name).name] if is_one else list(TASKS)
        values |= dict.fromkeys(tasks, kind(value))
    return values


def grids(given: Sequence[str]) -> dict[str, list[Rates]]:
    """`["light=2e-4:1e-3,5e-4"]`: two rates, the first with another one for MPO tensors."""
    grid = dict(GRID)
    for part in given:
        method, _, rates = part.partition("=")
        if method not in METHODS or not rates:
            raise ValueError(f"expected METHOD=LR[:MPO_LR],…, got {part!r}")
        pairs = [rate.split(":") for rate in rates.split(",")]
        grid[method] = [(float(pair[0]), float(pair[-1])) for pair in pairs]
    return grid


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, checked and completed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.glue_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, help="folder of runs.jsonl, table.md and .json")
    parser.add_argument("--data-dir", help="a folder in GLUE's own layout; without it the hub")
    parser.add_argument("--model", help="a hub name or a folder (all-MiniLM-L6-v2, from pip)")
    parser.add_argument("--tasks", nargs="+", default=["rte"], metavar="TASK", help="(rte)")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=METHODS, help="(all)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument(
        "--epochs", nargs="+", default=[], metavar="[TASK=]N", help="for all or one task (3)"
    )
    parser.add_argument(
        "--max-train-samples", nargs="+", default=[], metavar="[TASK=]N", help="(all rows)"
    )
    parser.add_argument(
        "--grid", nargs="+", default=[], metavar="METHOD=LR[:MPO_LR],…", help="rates to try"
    )
    parser.add_argument(
        "--grid-task", metavar="TASK", help="the one task whose rates serve all (each its own)"
    )
    parser.add_argument(
        "--grid-train-samples",
        nargs="+",
        default=[],
        metavar="[TASK=]N",
        help="rows to try rates on (as many)",
    )
    parser.add_argument(
        "--cache",
        default=str(Path(tempfile.gettempdir()) / "glue-table-models"),
        help="folder for models that several runs start from (in the system's for temporary files)",
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="(32)")
    parser.add_argument("--max-length", type=int, default=128, metavar="N", help="(128)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument(
        "--time", action="store_true", help="measure times at the end; nothing else should run"
    )
    parser.add_argument(
        "--budget-minutes", type=float, default=float("inf"), metavar="N", help="wall clock (none)"
    )
    options = parser.parse_args(argv)
    try:
        options.model_name = Path(options.model).name if options.model else "all-MiniLM-L6-v2"
        options.model = options.model or str(default_model())
        options.tasks = [get_task(task).name for task in options.tasks]
        options.grid_task = options.grid_task and get_task(options.grid_task).name
        options.epochs = by_task(float, 3.0, options.epochs)
        options.max_train_samples = by_task(int, None, options.max_train_samples)
        options.grid_train_samples = by_task(int, None, options.grid_train_samples)
        options.grid = grids(options.grid)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(argv: Sequence[str]) -> None:
    """Measure until all is there or the budget is spent; write the tables either way."""
    options = parse(argv)
    Path(options.output).mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    try:
        bench.measure()
        if options.time:
            bench.time()
    except (BudgetSpent, KeyboardInterrupt) as stop:
        say(f"stopped ({type(stop).__name__}); the same command continues")
    finally:
        conditions, rows, times = conditions_of(options, argv), bench.rows(), bench.times()
        whole = {"conditions": conditions, "rows": rows, "times": times}
        content, text = json.dumps(whole, indent=2) + "\n", markdown(rows, times, conditions)
        (Path(options.output) / "table.json").write_text(content, encoding="utf-8")
        (Path(options.output) / "table.md").write_text(text, encoding="utf-8")
        if rows:
            figure(rows, Path(options.output) / "table.png")
        if rounds := bench.rounds():
            lines = "".join(f"{json.dumps(each)}\n" for each in rounds)
            (Path(options.output) / "trace.jsonl").write_text(lines, encoding="utf-8")
            trace(rounds, Path(options.output) / "trace.png")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
