"""Every method of `methods.py` on GLUE: `python -m bench.glue.table --data-dir D --output O`.

For each task and method the rates of a small grid are tried with one seed on training rows held
out; the best is then run with every seed and reported on dev. Each run is a process of its own
(`methods.py`) and a line of `runs.jsonl` as soon as it ends; a run found there is not
repeated, so that an interrupted or out-of-budget bench continues where it stopped. With `--time`
what each method costs is measured at the end, with nothing beside it (`times.py`). What there is so
far is summed up in `table.md` and drawn (`report.py`), and with its conditions in `table.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from math import isinf
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from bench import facts
from bench.glue.encoder import say
from bench.glue.methods import METHODS, SHARES
from bench.glue.report import figures, markdown
from bench.results import text_of
from mpop.cli.options.values import positive_int
from mpop.data.glue import TASKS, get_task
from mpop.demo import default_model

# Of what is cut, the rates after the cut, all low; before it the rate is dense's.
GRID = {
    "dense": [1e-4, 2e-4, 4e-4],
    "full": [5e-5, 1e-4, 2e-4],
    "light": [5e-5, 1e-4, 2e-4],
    "light-encoder": [5e-5, 1e-4, 2e-4],
    "lora": [5e-4, 1e-3, 2e-3],
    "biases": [2e-3, 5e-3, 1e-2],
    **{name: [2.5e-5] for name, method in METHODS.items() if method.before},
    "svd": [1e-4],
    "svd-late": [2.5e-5, 1e-4],
    "dir": [1e-4],
    "dir-late": [2.5e-5, 1e-4],
    # The fewer are trained, the larger their steps.
    **{f"light-{name}": [1e-4, 2e-4, 4e-4] for name in ("10", "10-words", "10-tables", "5")},
    **{f"light-{name}": [2e-4, 4e-4, 8e-4] for name in ("2.5", "1")},
    "light-0.5": [4e-4, 8e-4, 1.6e-3],
    **{f"lora-{name}": [1e-3, 2e-3, 4e-3] for name in SHARES},
}
# Of times, each of all methods in turn.
_ROUNDS = 3
_TIMED = ("step_seconds", "latency_seconds", "peak_memory_bytes")
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
        return [sys.executable, "-m", "bench.glue.methods", json.dumps(options)]


class Bench:
    """The runs done so far, and the means to do another one within the budget."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.file = Path(options.output) / "runs.jsonl"
        self.deadline = time.monotonic() + 60 * options.budget_minutes
        self.results: dict[Run, dict[str, Any]] = {}
        self.failed: set[Run] = set()
        self.machines: dict[str, None] = {}  # in order
        self.writing = Lock()
        text = self.file.read_text() if self.file.exists() else ""
        # A run that was stopped while it was written down is measured again.
        *lines, unfinished = text.split("\n")
        if unfinished:
            self.file.write_text(text.removesuffix(unfinished))
        for record in map(json.loads, lines):
            run = Run(**{**record["run"], "rates": tuple(record["run"]["rates"])})
            if record["result"] is not None:
                self.results[run] = record["result"]
                self.machines[record["machine"]] = None

    def measure_run(self, run: Run) -> None:
        """Measure the run unless its result is known; a failure is written down and passed over.

        What failed before this bench began is tried again.

        Raises:
            BudgetSpent: Before the run, or in the midst of it; it leaves nothing behind.
        """
        if run in self.results or run in self.failed:
            return
        left = None if isinf(self.deadline) else self.deadline - time.monotonic()
        if left is not None and left <= 0:
            raise BudgetSpent
        name = f"{run.task} {run.method} seed {run.seed} rates {run.rates} on {run.eval_split}"
        say(name)
        done = self.start(run, self.kept(run), left)
        result = error = None
        if done.returncode == 0:
            result = json.loads(done.stdout.splitlines()[-1])
            result["model"] = run.model
            self.results[run] = result
            say(f"  {name}: {result['metric']} {result['value']:.4f}")
        else:
            self.failed.add(run)
            error = (done.stderr.splitlines() or ["no message"])[-1]
            say(f"  {name} failed: {error}")
        with self.writing, self.file.open("a") as file:
            machine = facts.processor()
            record = {"run": asdict(run), "result": result, "error": error, "machine": machine}
            self.machines[machine] = None
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

        In rounds, so that what else a machine does at one time is not one method's: medians. Where
        no run of this bench has left its model it is made again; on a few rows where it has the
        same shapes whatever it has learnt.
        """
        files: dict[Run, Path] = {}
        for run in self.plan():
            chosen = self.chosen(run)
            file = chosen and self.kept(chosen)
            if chosen is None or file is None:
                continue
            if not file.exists():
                has_choice = METHODS[run.method].calibrates
                made = chosen if has_choice else replace(chosen, max_train_samples=_FEW)
                self.start(made, file).check_returncode()
            files[run] = file
        found: dict[str, list[dict[str, Any]]] = {run.method: [] for run in files}
        for number in range(_ROUNDS):
            for run, file in files.items():
                say(f"times of {run.method}, {number + 1} of {_ROUNDS}")
                command = [sys.executable, "-m", "bench.glue.times", str(file), run.precision]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found[run.method].append(json.loads(done.stdout.splitlines()[-1]))
            medians = {
                method: rounds[0]
                | {name: statistics.median(each[name] for each in rounds) for name in _TIMED}
                for method, rounds in found.items()
            }
            self.times_file.write_text(text_of(medians), encoding="utf-8")

    @property
    def times_file(self) -> Path:
        return self.file.with_name("times.json")

    def plan(self) -> Iterator[Run]:
        """The first dev run of each task and method, without a rate yet."""
        options = self.options
        for task in options.tasks:
            for method in options.methods:
                yield Run(
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

    def grid(self, run: Run) -> list[Rates]:
        """The rates before and after the cut; the same two where nothing is cut."""
        rates = self.options.grid[run.method]
        if not METHODS[run.method].before:
            return [(rate, rate) for rate in rates]
        dense = self.chosen(replace(run, method="dense"))
        return [(dense.rates[0], rate) for rate in rates] if dense else []

    def chosen(self, run: Run) -> Run | None:
        """`run` at the rate that did best on the held-out rows; None if none has ended well."""
        grid = self.grid(run)
        if len(grid) == 1:
            return replace(run, rates=grid[0])
        known = [trial for trial in self.trials(run) if trial in self.results]
        if not known:
            return None

        def quality(trial: Run) -> tuple[float, float]:
            # A metric of zero, as Matthews' before anything is learnt, says nothing: the loss does.
            result = self.results[trial]
            last = [loss for _, loss in result["losses"]][-5:]
            return result["value"], -statistics.fmean(last)

        return replace(run, rates=max(known, key=quality).rates)

    def trials(self, run: Run) -> list[Run]:
        """`run` at every rate, on fewer rows where so asked, judged on training rows held out.

        On its own task, or on the one that speaks for it.
        """
        task = self.options.grid_tasks[run.task]
        sizes = [self.options.max_train_samples[task], self.options.grid_train_samples[task]]
        trial = replace(
            run,
            task=task,
            epochs=self.options.epochs[task],
            eval_split="train-holdout",
            max_train_samples=min((size for size in sizes if size), default=None),
        )
        return [replace(trial, rates=rates) for rates in self.grid(run)]

    def measure(self) -> None:
        """All grids, then all tasks and methods seed by seed, so that a budget cuts seeds first."""
        plan = list(self.plan())
        # What is cut begins as a dense model, at the rate that is best for that.
        cut = [run for run in plan if METHODS[run.method].before]
        whole = [run for run in plan if run not in cut]
        for runs in ([*(replace(run, method="dense") for run in cut), *whole], cut):
            grids = [self.trials(run) for run in runs]
            self.measure_runs([trial for grid in grids if len(grid) > 1 for trial in grid])
        chosen = [run for run in map(self.chosen, plan) if run]
        seeds = self.options.seeds
        self.measure_runs([replace(run, seed=seed) for seed in seeds for run in chosen])

    def measure_runs(self, runs: Sequence[Run]) -> None:
        """Measure each of them once, as many side by side as there are jobs.

        Raises:
            BudgetSpent: by any of them; those that have begun are ended by it as well.
        """
        with ThreadPoolExecutor(self.options.jobs) as threads:
            pending = [threads.submit(self.measure_run, run) for run in dict.fromkeys(runs)]
            try:
                for run in as_completed(pending):
                    run.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def rows(self) -> list[dict[str, Any]]:
        """One row a task and method, over the seeds that are there."""
        rows = []
        for run in self.plan():
            if chosen := self.chosen(run):
                runs = [replace(chosen, seed=seed) for seed in self.options.seeds]
                if done := {run.seed: self.results[run] for run in runs if run in self.results}:
                    tried = sum(trial in self.results for trial in self.trials(run))
                    rows.append({**summary(chosen, done), "tried": tried})
        return rows

    def rounds(self) -> list[dict[str, Any]]:
        """Every round of every squeeze, with its task and seed."""
        found = []
        for run in self.plan():
            for seed in self.options.seeds:
                chosen = self.chosen(run)
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


def conditions_of(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """What the figures hold for; each run names its own machine."""
    packages = ("transformers", "accelerate", "datasets", "peft")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return facts.conditions(
        *("bench.glue.table", argv, device, *packages),
        model=options.model_name,
        seeds=options.seeds,
        grid_tasks={task: options.grid_tasks[task] for task in options.tasks},
        grid_train_samples=options.grid_train_samples,
        batch_size=options.batch_size,
        max_length=options.max_length,
        precision=options.precision,
    )


def by_task(kind: Callable[[str], Any], default: Any, given: Sequence[str]) -> dict[str, Any]:
    """`["3", "rte=10"]`: 3 for every task, 10 for RTE."""
    values = dict.fromkeys(TASKS, default)
    for part in sorted(given, key=lambda part: "=" in part):
        name, is_one, value = part.rpartition("=")
        tasks = [get_task(name).name] if is_one else list(TASKS)
        values |= dict.fromkeys(tasks, kind(value))
    return values


def grids(given: Sequence[str]) -> dict[str, list[float]]:
    """`["light=2e-4,5e-4"]`: two rates."""
    grid = dict(GRID)
    for part in given:
        method, _, rates = part.partition("=")
        if method not in METHODS or not rates:
            raise ValueError(f"expected METHOD=LR,…, got {part!r}")
        grid[method] = [float(rate) for rate in rates.split(",")]
    return grid


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, checked and completed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.glue.table",
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
    parser.add_argument("--grid", nargs="+", default=[], metavar="METHOD=LR,…", help="rates to try")
    parser.add_argument(
        "--grid-task",
        nargs="+",
        default=[],
        metavar="[TASK=]TASK",
        help="the task whose rates serve all, or one (each its own)",
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
        "--jobs", type=positive_int, default=1, metavar="N", help="runs side by side (1)"
    )
    parser.add_argument(
        "--budget-minutes", type=float, default=float("inf"), metavar="N", help="wall clock (none)"
    )
    options = parser.parse_args(argv)
    try:
        options.model_name = Path(options.model).name if options.model else "all-MiniLM-L6-v2"
        options.model = options.model or str(default_model())
        options.tasks = [get_task(task).name for task in options.tasks]
        spokesmen = by_task(lambda name: get_task(name).name, None, options.grid_task)
        options.grid_tasks = {task: name or task for task, name in spokesmen.items()}
        options.epochs = by_task(float, 3.0, options.epochs)
        options.max_train_samples = by_task(int, None, options.max_train_samples)
        options.grid_train_samples = by_task(int, None, options.grid_train_samples)
        options.grid = grids(options.grid)
        Path(options.output).mkdir(parents=True, exist_ok=True)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    return options


def main(argv: Sequence[str]) -> None:
    """Measure until all is there or the budget is spent; write the tables either way."""
    options = parse(argv)
    bench = Bench(options)
    try:
        bench.measure()
        if options.time:
            bench.time()
    except (BudgetSpent, KeyboardInterrupt) as stop:
        say(f"stopped ({type(stop).__name__}); the same command continues")
    finally:
        conditions = {**conditions_of(options, argv), "machines": list(bench.machines)}
        rows, times = bench.rows(), bench.times()
        whole = {"conditions": conditions, "rows": rows, "times": times}
        content, text = text_of(whole), markdown(rows, times, conditions)
        (Path(options.output) / "table.json").write_text(content, encoding="utf-8")
        (Path(options.output) / "table.md").write_text(text, encoding="utf-8")
        if rounds := bench.rounds():
            lines = "".join(f"{json.dumps(each)}\n" for each in rounds)
            (Path(options.output) / "trace.jsonl").write_text(lines, encoding="utf-8")
        figures(rows, rounds, Path(options.output))
    print(text)
    if bench.failed and not rows:
        raise SystemExit(f"{len(bench.failed)} runs failed; each has its error in {bench.file}")


if __name__ == "__main__":
    main(sys.argv[1:])
