"""Importing, back ends, diagnostics, and training in two processes."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mpo_kernels import MPOLinear, MPOShape, available_backends, use_backend


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def test_importing_starts_no_cuda_and_needs_neither_triton_nor_transformers():
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['transformers'] = None\n"
        "import torch, mpo_kernels\n"
        "assert not torch.cuda.is_initialized()\n"
        "layer = mpo_kernels.MPOLinear.from_linear(torch.nn.Linear(6, 8))\n"
        "assert layer(torch.ones(2, 6)).shape == (2, 8)\n"
    )
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


def test_diagnostics():
    facts = json.loads(run("-m", "mpo_kernels", "--json").stdout)
    assert facts["torch"] == torch.__version__
    assert facts["backends"]["torch"]["available"] is True
    text = run("-m", "mpo_kernels").stdout
    assert torch.__version__ in text and "torch" in text


def test_backends_by_name():
    layer = MPOLinear(6, 8, MPOShape((2, 3), (4, 2), 2))
    x = torch.randn(2, 6)
    with use_backend("torch"):
        named = layer(x)
    assert torch.equal(named, layer(x))
    assert available_backends()["torch"][0]
    with pytest.raises(ValueError, match="got 'cudnn'"), use_backend("cudnn"):
        layer(x)
    result = run(
        "-c",
        "import torch, mpo_kernels as m; m.MPOLinear(6, 8, m.MPOShape((6,), (8,)))(torch.ones(6))",
        MPO_KERNELS_BACKEND="nonsense",
    )
    assert "got 'nonsense'" in result.stderr


DDP = """
import sys, torch, torch.distributed as dist
from mpo_kernels import MPOLinear, MPOShape
torch.manual_seed(0)
layer = MPOLinear(24, 30, MPOShape((2, 3, 4), (5, 3, 2), 5)).double()
layer.freeze_central()
x, y = torch.randn(8, 24).double(), torch.randn(8, 30).double()
rank, store = int(sys.argv[1]), "file://" + sys.argv[2]
dist.init_process_group("gloo", rank=rank, world_size=2, init_method=store)
model = torch.nn.parallel.DistributedDataParallel(layer)
mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
for _ in range(3):
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(x[mine]), y[mine]).backward()
    optimizer.step()
if dist.get_rank() == 0:
    torch.save(layer.state_dict(), sys.argv[3])
dist.destroy_process_group()
"""


def test_two_processes_train_as_one(tmp_path):
    store, saved = str(tmp_path / "store"), str(tmp_path / "state.pt")
    workers = [
        subprocess.Popen([sys.executable, "-c", DDP, str(rank), store, saved]) for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    torch.manual_seed(0)
    layer = MPOLinear(24, 30, MPOShape((2, 3, 4), (5, 3, 2), 5)).double()
    layer.freeze_central()
    x, y = torch.randn(8, 24).double(), torch.randn(8, 30).double()
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(layer(x), y).backward()
        optimizer.step()
    for name, value in torch.load(saved, weights_only=True).items():
        torch.testing.assert_close(value, layer.state_dict()[name])
