"""What a call costs the host, the driver's launch aside: ``pytest tests/csrc --benchmark-only``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mpo_kernels as mk
from mpo_kernels.backends.cuda import backend
from mpo_kernels.ops import eager


@pytest.mark.parametrize("way", ["MPOLinear", "MPOLinear, dispatched", "nn.Linear"])
def test_layer(
    benchmark: Any, cuda_backend: backend.CudaBackend, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    torch.set_default_device(None)  # a mode, which slows every call
    monkeypatch.setenv("MPO_KERNELS_NO_LAUNCH", "1")
    # With a CPU's figures others are chosen.
    monkeypatch.setattr(backend, "_time", lambda chain, _: 1e-6 * chain.seconds)
    shape = mk.MPOShape.low_rank(64, 64, 16)
    layer = mk.MPOLinear(64, 64, shape, dtype=torch.bfloat16)
    with mk.use_backend("cuda"):
        layer = layer.merged(1).requires_grad_(False)
    if way == "nn.Linear":
        layer = layer.to_linear().requires_grad_(False)
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    if way.endswith("dispatched"):
        monkeypatch.setattr(eager, "MISSING", "left out")
    with mk.use_backend("cuda"):
        benchmark.pedantic(layer, (x,), rounds=100, iterations=100, warmup_rounds=2)
        if way != "nn.Linear":
            cores = list(layer.cores)
            plan = cuda_backend.plan_for(1, x.dtype, x.device, cores, None, (64, 64))
            assert plan.algorithm == "decode"
