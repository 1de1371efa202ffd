"""The gate's own logic, without a GPU: what it keeps, what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench.gpu import gate
from mpo_kernels.backends import validation


@pytest.fixture(autouse=True)
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "validated.json"
    path.write_text("[]")
    monkeypatch.setattr(validation, "RECORDS", path)
    return path


CONDITIONS = {"device": "a device", "triton": "3.6.0", "commit": "0123456789abcdef"}


def found(**steps: str) -> dict:
    results = {name: {"status": status} for name, status in steps.items()}
    sources = {"triton": validation.source_hash("triton"), "cuda": gate.csrc_hash()}
    return {"sources": sources, "conditions": CONDITIONS, "steps": results}


CUDA = {"build": "passed", "cuda_tests": "passed"}


@pytest.mark.parametrize(
    ("kernels", "steps"),
    [
        ("triton", {"tests": "passed", "sanitizer": "out of time", "build": "failed"}),
        ("cuda", {"tests": "failed", **CUDA, "cuda_racecheck": "out of time"}),
    ],
)
def test_validation_holds_for_the_sources_that_passed(
    kernels: str, steps: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {"triton": validation.source_hash("triton"), "cuda": gate.csrc_hash()}
    monkeypatch.setattr(validation, "source_hash", sources.get)
    assert validation.validations(kernels) == [] and "never run" in validation.summary(kernels)
    file = tmp_path / "gate.json"
    file.write_text(json.dumps(found(**steps)))
    assert gate.main(["--accept", str(file)]) == 0
    (other,) = set(validation.KINDS) - {kernels}
    assert validation.validations(other) == []
    assert [record["device"] for record in validation.validations(kernels)] == ["a device"]
    assert "a device, triton 3.6.0, commit 0123456789ab" in validation.summary(kernels)
    monkeypatch.setattr(validation, "source_hash", lambda kernels: "another")
    assert validation.validations(kernels) == []


@pytest.mark.parametrize(
    "steps",
    [
        {},
        {"tests": "failed"},
        {"tests": "passed", "sanitizer": "failed"},
        {"cuda_tests": "passed", "build": "failed"},
        {**CUDA, "cuda_memcheck": "failed"},
        {**CUDA, "cuda_racecheck": "failed"},
    ],
)
def test_a_gate_that_did_not_pass_is_refused(steps: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="expected a gate that passed"):
        gate.accept(found(**steps))


def test_other_sources_are_refused() -> None:
    with pytest.raises(ValueError, match="other sources"):
        gate.accept(found(tests="passed") | {"sources": "another"})


@pytest.mark.parametrize(
    "code, limit, status",
    [
        ("print('fine')", 30, "passed"),
        ("1 / 0", 30, "failed"),
        ("while True: pass", 1, "out of time"),
    ],
)
def test_a_step_says_how_it_ended(code: str, limit: int, status: str, tmp_path: Path) -> None:
    result = gate.step("one", [sys.executable, "-c", code], limit, tmp_path)
    assert result["status"] == status


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if gate.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="2"):
        gate.main(["--output", str(tmp_path)])
    assert "expected a GPU" in capsys.readouterr().err
