"""What a call costs the host, the launch aside: ``pytest tests/csrc --benchmark-only``."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import mpo_kernels as mk
from mpo_kernels.backends.cuda import backend, extension


class Unlaunched:
    """A schedule, and a launch that does nothing."""

    def __init__(self, chain: Any) -> None:
        self.seconds, self.partials, self.counters = 0.0, chain.partials, chain.counters

    def launch(self, *addresses: Any) -> None:
        pass


@pytest.mark.parametrize("way", ["MPOLinear", "nn.Linear"])
def test_layer(
    benchmark: Any, cuda_backend: ModuleType, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    torch.set_default_device(None)  # a mode, which slows every call
    kernels = extension.load()
    chain = SimpleNamespace(
        Chain=lambda *a: Unlaunched(kernels.Chain(*a)), MAX_ROWS=16, MAX_PARTS=3
    )
    monkeypatch.setattr(extension, "loaded", lambda: (chain, ""))
    shape = mk.MPOShape.low_rank(64, 64, 16)
    layer = mk.MPOLinear(64, 64, shape, dtype=torch.bfloat16).requires_grad_(False)
    if way == "nn.Linear":
        layer = layer.to_linear().requires_grad_(False)
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    with mk.use_backend("cuda"):
        benchmark.pedantic(layer, (x,), rounds=100, iterations=100, warmup_rounds=2)
        if way == "MPOLinear":
            cores = list(layer.cores)
            plan = backend.plan_for(1, x.dtype, x.device, cores, None, (64, 64))
            assert plan.algorithm == "decode"
