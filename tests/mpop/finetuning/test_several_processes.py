"""Training over two processes is training on one: FSDP2, accelerate, Trainer with DDP.

Two processes are started once for all of it; the one is this.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_glue import save_bert

import mpop
from examples import accelerated, fsdp
from mpop.cli import main
from mpop.finetune import finetune

ROOT = Path(__file__).parents[3]
# Adam and gradient clipping would hide a gradient of the wrong size.
PLAIN: dict[str, Any] = {
    "epochs": 1,
    "max_steps": 4,
    "max_length": 16,
    "learning_rate": 0.05,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
}


def train(folder: str, bert: str, data: str) -> None:
    """All of it, by as many processes as there are."""
    # torchrun's store knows one group of processes, which the others take over.
    with mock.patch("torch.distributed.destroy_process_group"):
        fsdp.main([f"{folder}/fsdp"])
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ["ACCELERATE_MIXED_PRECISION"] = precision
        accelerated.main([f"{folder}/{precision}"])
    del os.environ["ACCELERATE_MIXED_PRECISION"]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batch = {"data_dir": data, "batch_size": 8 // processes}
    finetune(bert, "sst2", f"{folder}/plain", "light", **batch, **PLAIN)
    command = f"finetune --model {bert} --output {folder}/adamw --task sst2 --data-dir {data} "
    command += f"--method light --epochs 2 --max-length 16 --batch-size {48 // processes}"
    assert main(command.split()) == 0
    AcceleratorState._reset_state(reset_partial_state=True)


class Trained(NamedTuple):
    """A folder, and what was printed."""

    folder: Path
    printed: str


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[tuple[Trained, Trained]]:
    """What one process made, and what two did."""
    folder, printed = tmp_path_factory.mktemp("both"), StringIO()
    bert = save_bert(folder / "bert", dropout=0.0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ACCELERATE_USE_CPU", "1")
        patched.setenv("CUDA_VISIBLE_DEVICES", "")
        patched.setenv("OMP_NUM_THREADS", "1")
        paths = (ROOT, ROOT / "python", ROOT / "tests" / "mpop")
        patched.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
        command = (*launcher, "--nproc-per-node=2", __file__, folder / "two", bert, data)
        two = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert two.returncode == 0, two.stderr[-3000:]
        for accelerator in ("cuda", "accelerator"):
            patched.setattr(f"torch.{accelerator}.is_available", lambda: False)
        with redirect_stdout(printed):
            train(str(folder / "one"), str(bert), str(data))
    yield Trained(folder / "one", printed.getvalue()), Trained(folder / "two", two.stdout)


def assert_close(found: Path, expected: Path, atol: float, rtol: float = 1e-3) -> None:
    """The checkpoints hold the same tensors."""
    a, b = (load_file(path / "model.safetensors") for path in (found, expected))
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def test_fsdp2(both: tuple[Trained, Trained]) -> None:
    one, two = both
    assert "2 processes, loss" in two.printed
    assert_close(two.folder / "fsdp", one.folder / "fsdp", atol=2e-3)
    model = mpop.load(two.folder / "fsdp").eval()  # on one process
    ids = (torch.arange(12) + 7)[None] % 61
    with torch.no_grad():
        right = model(ids).logits[0, 4:-1].argmax(-1) == ids[0, 5:]
    assert right.float().mean() > 0.7


# In bf16 the halves of a batch round differently, and Adam makes a step of the smallest difference:
# weights agree to two of its steps of 1e-2.
@pytest.mark.parametrize(("precision", "atol"), [("no", 1e-5), ("bf16", 2e-2)])
def test_accelerate(precision: str, atol: float, both: tuple[Trained, Trained]) -> None:
    last = []
    for processes, made in enumerate(both, 1):
        line = rf"{processes} processes, {precision} mixed precision, loss .* -> ([\d.]+)"
        last += [float(loss) for loss in re.findall(line, made.printed)]
    one, two = last
    assert two == pytest.approx(one, rel=0.01) and two < 0.2
    assert_close(both[1].folder / precision, both[0].folder / precision, atol=atol)
    assert mpop.load(both[1].folder / precision)


def test_trainer(both: tuple[Trained, Trained]) -> None:
    """By the function with plain gradient descent, and by the command, all rows at a time."""
    one, two = (json.loads((made.folder / "plain" / "results.json").read_text()) for made in both)
    assert one["batch_size"] == two["batch_size"] == 8
    np.testing.assert_allclose(one["losses"], two["losses"], rtol=1e-4)
    a, b = (load_file(made.folder / "plain" / "model.safetensors") for made in both)
    norms = [[tensors[name].norm() for name in sorted(tensors)] for tensors in (a, b)]
    np.testing.assert_allclose(*norms, rtol=1e-5, atol=1e-6)
    assert one["eval_samples"] == two["eval_samples"] == 24
    assert one["value"] == two["value"]
    assert_close(both[0].folder / "adamw", both[1].folder / "adamw", atol=1e-5)
    assert mpop.load(both[1].folder / "adamw")


if __name__ == "__main__":
    train(*sys.argv[1:])
