"""`mpop squeeze`: a task from the command line, what it leaves behind and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_glue import last_json

import mpop
from mpop.cli import main
from mpop.finetuning.squeeze_task import squeeze_on_task


def test_squeezing_a_task(data: Path, bert: Path, tmp_path: Path, capsys: Any) -> None:
    common = ["--task", "sst2", "--data-dir", str(data), "--max-length", "16"]
    full, light, small = (str(tmp_path / name) for name in ("full", "light", "small"))
    few = ["--num-cores", "3", "--include", "*.query", "*.intermediate.dense", "pooler.dense"]
    assert main(["compress", "--model", str(bert), "--output", full, *few]) == 0
    made = ["finetune", "--model", full, "--method", "light", "--output", light]
    assert main([*made, *common, "--epochs", "1"]) == 0
    options = ["--max-drop", "0.5", "--max-rounds", "3", "--settle-steps", "4", "--window", "1"]
    command = ["squeeze", "--model", light, "--output", small, *common, *options, "--json"]
    capsys.readouterr()
    assert main(command) == 0
    result = last_json(capsys.readouterr().out)
    assert result["parameters"] < result["parameters_before"] and len(result["rounds"]) <= 3
    for name in ("squeeze.json", "squeeze/trace.jsonl", "squeeze/trace.png", "config.json"):
        assert Path(small, name).is_file()
    assert mpop.count_parameters(mpop.load(small)).total == result["parameters"]
    assert main(["evaluate", "--model", small, *common, "--json"]) == 0
    assert last_json(capsys.readouterr().out)["value"] == pytest.approx(result["metric"])
    # With more rounds allowed it goes on from where it ended.
    assert main(command) == 2
    assert "small holds a model: choose another folder" in capsys.readouterr().err
    killed = tmp_path / "killed"
    shutil.copytree(Path(small, "squeeze"), killed / "squeeze")
    assert main([*command[:4], str(killed), *command[5:]]) == 2
    assert "holds a squeeze: resume it" in capsys.readouterr().err
    assert main([*command[:4], full, *command[5:], "--resume"]) == 2  # of no squeeze
    assert "full holds a model: choose another folder" in capsys.readouterr().err
    assert main([*command, "--resume", "--seed", "3"]) == 2
    assert "expected a run of seed = 3, got one of 0" in capsys.readouterr().err
    assert main([*command, "--resume", "--max-rounds", "5"]) == 0
    longer = last_json(capsys.readouterr().out)
    assert longer["rounds"][:3] == result["rounds"] and len(longer["rounds"]) > 3
    assert main([*command[:4], str(tmp_path / "o"), *command[5:], "--step", "1.5"]) == 2
    assert "0.002 <= step < 1" in capsys.readouterr().err
    assert main([*command[:4], str(tmp_path / "o"), "--task", "cola", *command[7:]]) == 2
    assert "has the outputs negative, positive; cola needs" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    for samples, code in (("1", 2), ("3", 0), ("0", 0)):  # of two rows on there are two batches
        few = [*command[:4], str(tmp_path / samples), *command[5:], "--calibration-samples"]
        assert main([*few, samples]) == code
        assert (tmp_path / samples).exists() == (code == 0)
    assert "calibration_samples: expected 0, or at least 2, got 1" in capsys.readouterr().err


def test_refusals(data: Path, bert: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["squeeze", "--model", str(bert), "--output", str(tmp_path / "o")]
    command += ["--task", "sst2", "--data-dir", str(data), "--max-drop", "0.1"]
    assert main(command) == 2
    assert "is dense; fine-tune it with --method light first" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "setting", [{"eval_split": "test"}, {"precision": "fp16"}, {"max_length": 0}, {"window": 0}]
)
def test_bad_settings_are_named_and_write_nothing(
    setting: dict[str, Any], data: Path, bert: Path, tmp_path: Path
) -> None:
    model = str(tmp_path / "model")
    assert main(["compress", "--model", str(bert), "--output", model, "--ranks", "2"]) == 0
    (name,) = setting
    with pytest.raises(ValueError, match=f"^{name} must be "):
        squeeze_on_task(model, "sst2", tmp_path / "o", max_drop=0.1, data_dir=data, **setting)
    assert not (tmp_path / "o").exists()


def test_compressing_with_calibration(data: Path, bert: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["compress", "--model", str(bert), "--output", str(tmp_path / "o"), "--json"]
    command += ["--compression", "0.5", "--factors", "auto", "--no-embeddings"]
    command += ["--calibrate", "sst2", "--data-dir", str(data)]
    capsys.readouterr()
    assert main(command) == 0
    rows = last_json(capsys.readouterr().out)["rows"]
    assert rows and all(0 < row["output_error"] < 1 for row in rows)
    assert main([*command, "--overwrite", "--samples", "1"]) == 2
    assert "give more text" in capsys.readouterr().err
