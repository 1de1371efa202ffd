"""Training over two processes is training on one: DDP through the command, accelerate, FSDP2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_glue import save_bert, write_glue

import mpop

ROOT = Path(__file__).parents[2]
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


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"), train=48, dev=24)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("encoder"), dropout=0.0)


def finetune(launcher: list[str], rows: int, glue: Path, encoder: Path, output: Path) -> None:
    run(
        *(*launcher, "-m", "mpop", "finetune", "--model", str(encoder), "--task", "sst2"),
        *("--data-dir", str(glue), "--method", "light", "--output", str(output)),
        *("--epochs", "2", "--max-length", "16", "--batch-size", str(rows), "--json"),
    )


def test_ddp(glue: Path, encoder: Path, tmp_path: Path) -> None:
    finetune(TORCHRUN, 24, glue, encoder, tmp_path / "two")
    finetune([sys.executable], 48, glue, encoder, tmp_path / "one")  # all rows: no order matters
    assert_close(tmp_path / "two", tmp_path / "one", atol=1e-5)
    assert mpop.load(tmp_path / "two")
