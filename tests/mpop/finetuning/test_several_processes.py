"""Training over two processes is training on one: accelerate, FSDP2; DDP is in test_finetune.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mpop

ROOT = Path(__file__).parents[3]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run(*command: str, **variables: str) -> str:
    path = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def assert_close(found: Path, expected: Path, atol: float) -> None:
    """The checkpoints hold the same tensors."""
    a, b = (load_file(path / "model.safetensors") for path in (found, expected))
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-3)


def test_fsdp2(tmp_path: Path) -> None:
    printed = run(*TORCHRUN, "-m", "examples.fsdp", str(tmp_path / "two"))
    assert "2 processes, loss" in printed
    run(sys.executable, "-m", "examples.fsdp", str(tmp_path / "one"))
    assert_close(tmp_path / "two", tmp_path / "one", atol=2e-3)
    model = mpop.load(tmp_path / "two").eval()  # on one process
    ids = (torch.arange(12) + 7)[None] % 61
    with torch.no_grad():
        right = model(ids).logits[0, 4:-1].argmax(-1) == ids[0, 5:]
    assert right.float().mean() > 0.7


def accelerated(launcher: list[str], processes: int, precision: str, output: Path) -> float:
    """Train, save, and return the last loss."""
    variables = {"ACCELERATE_USE_CPU": "1", "ACCELERATE_MIXED_PRECISION": precision}
    printed = run(*launcher, "-m", "examples.accelerated", str(output), **variables)
    assert f"{processes} processes, {precision} mixed precision" in printed
    (last,) = re.findall(r"-> ([\d.]+)", printed)
    return float(last)


# In bf16 the halves of a batch round differently, and Adam makes a step of the smallest difference:
# weights agree to two of its steps of 1e-2.
@pytest.mark.parametrize(("precision", "atol"), [("no", 1e-5), ("bf16", 2e-2)])
def test_accelerate(precision: str, atol: float, tmp_path: Path) -> None:
    two = accelerated(TORCHRUN, 2, precision, tmp_path / "two")
    one = accelerated([sys.executable], 1, precision, tmp_path / "one")
    assert two == pytest.approx(one, rel=0.01) and two < 0.2
    assert_close(tmp_path / "two", tmp_path / "one", atol=atol)
    assert mpop.load(tmp_path / "two")
