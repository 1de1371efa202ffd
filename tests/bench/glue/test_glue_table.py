"""The GLUE bench with fine-tuning replaced by a formula: choice, resuming, budget and table."""

from __future__ import annotations

import itertools
import json
import subprocess
import threading
from pathlib import Path

import pytest

from bench import facts
from bench.glue import table


@pytest.fixture
def finetune(monkeypatch):
    """Stand in for `mpop finetune`; the commands it was given."""
    commands = []
    steps = itertools.cycle([9.0, 0.2855, 0.1])  # of three rounds: the median counts

    real_run = subprocess.run

    def run(command, **settings):
        if command[0] == "git":
            return real_run(command, **settings)
        if command[2] == "bench.glue.times":
            assert Path(command[3]).read_text() == "a model" and command[4] == "fp32"
            times = {"step_seconds": next(steps), "latency_seconds": 0.005}
            times["peak_memory_bytes"] = 2**30
            times |= {"machine": "a processor", "threads": 3}
            return subprocess.CompletedProcess(command, 0, "log\n" + json.dumps(times), "")
        assert command[1:3] == ["-m", "bench.glue.methods"]
        options = json.loads(command[3])
        commands.append(options)
        rate = options["learning_rate"]
        if options["keep"]:
            Path(options["keep"]).write_text("a model")
        if rate > 1:
            return subprocess.CompletedProcess(command, 1, "", "noise\nmpop: the loss is nan")
        # Best at 0.5 on the held-out rows, at 1 on dev: the choice may look at the former alone.
        best = 0.5 if options["eval_split"] == "train-holdout" else 1
        result = {
            "metric": "accuracy",
            "value": 1 - abs(rate - best) + 0.1 * options["seed"] + (options["task"] == "wnli"),
            "trainable_parameters": 2_500_000 * (1 + (options["task"] == "wnli")),
            "total_parameters": 10_000_000,
            "train_samples": 1200,
            "eval_samples": 300,
            "disk_bytes": 40_000_000,
            "rounds": [
                {"step": 1, "parameters": 9_000_000, "metric": 0.5, "kept": True},
                {"step": 2, "parameters": 8_000_000, "metric": 0.3, "kept": False},
            ],
            "losses": [[k, 1 / k + (rate == 0.75)] for k in range(1, 20)],
        }
        return subprocess.CompletedProcess(command, 0, "log\n" + json.dumps(result), "")

    monkeypatch.setattr(table.subprocess, "run", run)
    return commands


def run(output, *more):
    arguments = f"--output {output} --model tiny --data-dir /some/where/glue --methods light"
    arguments += f" --cache {output}/cache --seeds 0 1 --grid light=0.25,0.5,1,2 --epochs 2 rte=5"
    table.main([*arguments.split(), *more])
    return json.loads((output / "table.json").read_text())


def test_choice_table_and_resuming(finetune, tmp_path):
    whole = run(tmp_path, "--max-train-samples", "rte=1200")
    assert [command["eval_split"] for command in finetune] == ["train-holdout"] * 4 + ["dev"] * 2
    assert finetune[-1]["learning_rate"] == 0.5
    assert finetune[-1]["mpo_learning_rate"] == 0.5
    assert finetune[-1]["epochs"] == 5.0
    assert finetune[-1]["max_train_samples"] == 1200
    (row,) = whole["rows"]
    assert (row["mean"], row["seeds"]) == (pytest.approx(0.55), [0, 1])
    assert row["sd"] == pytest.approx(0.1 / 2**0.5)
    text = (tmp_path / "table.md").read_text()
    assert "| `light` | 55.0 ± 7.1 | 55.0 | 2.50 M | 10.00 M | 40 MB | – | – | – |" in text
    assert "/some/where" not in text
    assert "- `light`: MPOP_full+LFA" in text
    assert "| `light` | 0.5 (3 tried) |" in text  # the fourth has diverged
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert [(line["seed"], line["step"]) for line in lines] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert (tmp_path / "trace.svg").stat().st_size > 1000
    assert (tmp_path / "tasks.svg").stat().st_size > 1000
    finetune.clear()
    assert run(tmp_path, "--max-train-samples", "rte=1200")["rows"] == [row]
    # Only the diverged rate is tried once more.
    assert [command["learning_rate"] for command in finetune] == [2.0]


def test_times_are_of_the_model_that_the_first_seed_left(finetune, tmp_path):
    run(tmp_path, "--time")
    assert [bool(command["keep"]) for command in finetune] == [False] * 4 + [True, False]
    text = (tmp_path / "table.md").read_text()
    assert "| 40 MB | 286 ms | 1024 MiB | 5.0 ms |" in text
    assert "with nothing else running, 3 threads of a processor" in text
    # Without that model one is made on a few rows; its result is not the method's.
    (tmp_path / "cache" / "rte-light.pt").unlink()
    finetune.clear()
    whole = run(tmp_path, "--time")
    assert finetune[-1]["max_train_samples"] == 320 and finetune[-1]["keep"]
    assert whole["rows"][0]["seeds"] == [0, 1]
    assert "286 ms" in (tmp_path / "table.md").read_text()


def test_times_of_what_is_chosen_by_the_data_are_of_all_rows(finetune, tmp_path):
    options = "--time", "--methods", "chosen", "--grid", "dense=1", "chosen=0.1"
    run(tmp_path, *options)
    (tmp_path / "cache" / "rte-chosen.pt").unlink()
    finetune.clear()
    run(tmp_path, *options)
    assert [(c["max_train_samples"], bool(c["keep"])) for c in finetune] == [(None, True)]


def test_jobs_go_on_side_by_side(finetune, monkeypatch, tmp_path):
    both, one = threading.Barrier(2), table.subprocess.run

    def together(command, **settings):
        if "bench.glue.methods" in command:
            both.wait(timeout=30)
        return one(command, **settings)

    monkeypatch.setattr(table.subprocess, "run", together)
    (row,) = run(tmp_path, "--jobs", "2")["rows"]
    assert (row["mean"], row["seeds"], row["tried"]) == (pytest.approx(0.55), [0, 1], 3)
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 6


def test_one_task_may_choose_the_rates_of_all(finetune, tmp_path):
    whole = run(tmp_path, "--tasks", "rte", "cola", "--grid-task", "cola")
    trials = [c for c in finetune if c["eval_split"] == "train-holdout"]
    assert {c["task"] for c in trials} == {"cola"} and {c["epochs"] for c in trials} == {2.0}
    assert [row["rates"] for row in whole["rows"]] == [[0.5, 0.5]] * 2


def test_what_is_cut_begins_at_the_rate_that_was_best_for_dense(finetune, tmp_path):
    run(tmp_path, "--methods", "chosen", "--grid", "dense=0.25,0.5,1", "chosen=0.1")
    assert [command["method"] for command in finetune] == ["dense"] * 3 + ["chosen"] * 2
    rates = finetune[-1]["learning_rate"], finetune[-1]["mpo_learning_rate"]
    assert rates == (0.5, 0.1)
    assert "| `chosen` | 0.5 / 0.1 |" in (tmp_path / "table.md").read_text()


def test_a_task_may_choose_for_itself_where_another_speaks_for_the_rest(finetune, tmp_path):
    tasks = ("--tasks", "rte", "cola", "wnli", "--grid-task", "rte", "cola=cola")
    run(tmp_path, *tasks)
    trials = [c["task"] for c in finetune if c["eval_split"] == "train-holdout"]
    assert trials == ["rte"] * 4 + ["cola"] * 4
    text = (tmp_path / "table.md").read_text()
    assert "| rates of | RTE, WNLI | CoLA |" in text
    assert "| 155.0 ± 7.1 | 55.0 | 2.50 M |" in text  # the means are without WNLI


def test_a_run_cut_off_while_written_down_is_measured_again(finetune, tmp_path):
    rows = run(tmp_path)["rows"]
    runs = tmp_path / "runs.jsonl"
    runs.write_text(runs.read_text()[:-20])
    finetune.clear()
    assert run(tmp_path)["rows"] == rows
    assert [(c["seed"], c["learning_rate"]) for c in finetune] == [(0, 2.0), (1, 0.5)]
    assert len(runs.read_text().splitlines()) == 7  # the diverged one twice
    machines = {json.loads(line)["machine"] for line in runs.read_text().splitlines()}
    assert machines == {facts.processor()}


def test_nothing_but_failures_is_a_failure(finetune, tmp_path):
    with pytest.raises(SystemExit, match=r"2 runs failed; each has its error in .*runs\.jsonl"):
        run(tmp_path, "--grid", "light=2,3", "--seeds", "0", "--methods", "light")


def test_no_time_left_writes_an_empty_table(finetune, tmp_path):
    whole = run(tmp_path, "--budget-minutes", "0")
    assert finetune == []
    assert whole["rows"] == []


@pytest.mark.parametrize(
    "arguments", [("--tasks", "sst3"), ("--grid", "lite=1"), ("--epochs", "rte=x")]
)
def test_bad_options(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        table.parse(["--output", str(tmp_path), "--model", "tiny", *arguments])
    assert end.value.code == 2


def test_a_tie_goes_to_the_lower_loss(finetune, tmp_path):
    # 0.25 and 0.75 are as far from the best; 0.75 has the higher loss at its end.
    run(tmp_path, "--grid", "light=0.75,0.25")
    assert {command["learning_rate"] for command in finetune[2:]} == {0.25}
