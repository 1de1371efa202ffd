"""A small encoder's step on a CPU, by every method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import train_step


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
