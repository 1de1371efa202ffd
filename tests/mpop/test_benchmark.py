"""`mpop bench`: a compressed model beside its dense self."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from tiny_glue import last_json
from tiny_models import build

import mpop
from mpop import benchmark
from mpop.cli import main


def _saved(name: str, path: Path, **options: Any) -> mpop.CompressionReport:
    model = build(name)
    report = mpop.compress(model, mpop.CompressionConfig(**options))
    mpop.save(model, path)
    return report


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_both_are_measured(
    name: str, tmp_path: Path, capsys: Any, in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "t5":  # BERT is measured in processes of its own
        monkeypatch.setattr(subprocess, "run", in_process)
    report = _saved(name, tmp_path / "model", compression=0.5)
    command = ["bench", "--model", str(tmp_path / "model"), "--batch-sizes", "1", "3"]
    command += ["--length", "9", "--new-tokens", "4", "--repeats", "2"]
    assert main([*command, "--plot", str(tmp_path / "b.png"), "--json"]) == 0
    found = last_json(capsys.readouterr().out)
    dense, mpo = found["dense"], found["mpo"]
    assert (dense["parameters"], mpo["parameters"]) == (
        report.parameters_before,
        report.parameters_after,
    )
    for measured in (dense, mpo):
        assert measured["disk_bytes"] >= 4 * measured["parameters"]
        assert measured["peak_memory_bytes"] > measured["disk_bytes"]
        assert set(measured["seconds"]) == {"1", "3"}
        for size, seconds in measured["seconds"].items():
            assert measured["tokens_per_second"][size] == pytest.approx(9 * int(size) / seconds)
        assert ("new_tokens_per_second" in measured) == (name != "bert")
    assert (tmp_path / "b.png").stat().st_size > 1000
    text = benchmark.format_benchmark(found)
    ratio = report.parameters_after / report.parameters_before
    assert f"{ratio:.2f}" in next(line for line in text.splitlines() if "parameters" in line)


def test_refusals(tmp_path: Path, capsys: Any) -> None:
    build("bert").save_pretrained(tmp_path / "dense")
    assert main(["bench", "--model", str(tmp_path / "dense")]) == 2
    assert "is dense; compress it first" in capsys.readouterr().err
    _saved("bert", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["bench", "--model", str(tmp_path / "model")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("mpop bench: error: ")
    with pytest.raises(ValueError, match="of at least 1"):
        benchmark.benchmark(tmp_path / "model", batch_sizes=())
    with pytest.raises(ValueError, match="precision: expected one of fp32"):
        benchmark.benchmark(tmp_path / "model", precision="int8")


@pytest.mark.parametrize(("name", "longest"), [("bert", 20), ("roberta", 18)])
def test_a_text_is_no_longer_than_the_model_takes(name: str, longest: int, tmp_path: Path) -> None:
    _saved(name, tmp_path / "model")
    options = {"batch_sizes": (1,), "length": 10**6, "repeats": 1}
    assert benchmark.measure(tmp_path / "model", options)["length"] == longest


@pytest.mark.parametrize("name", ["t5-classifier", "bart-classifier"])
def test_a_text_ends_once(name: str, tmp_path: Path) -> None:
    """As those that classify by its end expect."""
    build(name).save_pretrained(tmp_path)
    options = {"batch_sizes": (1, 64), "length": 20, "repeats": 1}
    assert set(benchmark.measure(tmp_path, options)["seconds"]) == {1, 64}
