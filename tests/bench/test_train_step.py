"""A small encoder's step on a CPU, by every method."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from bench import train_step
from mpo_kernels.testing import HostTransfers


def test_every_method_takes_a_step(tmp_path: Path) -> None:
    output = tmp_path / "steps.json"
    small = ["--layers", "1", "--hidden", "64", "--batch", "2", "8", "--modes", "eager"]
    assert train_step.main(["--output", str(output), *small]) == 0
    results = json.loads(output.read_text())
    found = {record["method"]: record for record in results["records"]}
    assert list(found) == list(train_step.METHODS)
    assert all(record["step_ms"] > 0 for record in found.values())
    light = found["light"]["trained"]
    assert found["light-4bit"]["trained"] == light < found["dense"]["trained"] / 2
    assert found["lora"]["trained"] == pytest.approx(light, rel=0.1)
    assert results["conditions"]["batch"] == [2, 8]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--layers", "0"], "--layers: expected a positive integer, got '0'"),
        (["--batch", "-1", "8"], "--batch: expected a positive integer, got '-1'"),
        (["--batch", "2", "1000"], "--batch: expected at most 512 tokens, got 1000"),
        (["--hidden", "100"], "--hidden: expected a multiple of 64, got 100"),
        (["--modes", "captured"], "captured: expected a GPU"),
        (["--output", "."], "expected a file to write results to, got the folder"),
    ],
)
def test_bad_options_are_one_line(
    options: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "captured" in options and torch.cuda.is_available():
        pytest.skip("a GPU captures")
    with pytest.raises(SystemExit):
        train_step.main(["--output", str(tmp_path / "out.json"), *options])
    assert line in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", train_step.METHODS)
def test_a_captured_step_moves_nothing_between_device_and_host(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers reads its mask where nothing is captured, and torch has no such AdamW on a CPU.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    adam = import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda: ["cpu"])
    config = BertConfig(
        num_hidden_layers=1, hidden_size=64, intermediate_size=256, num_attention_heads=1
    )
    _, step = train_step.step_of(method, "captured", config, (2, 8), torch.device("cpu"))
    step()
    with HostTransfers() as found:
        step()
    assert not found.names
