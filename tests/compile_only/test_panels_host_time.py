"""Host time of a light step, without the device: ``pytest tests/compile_only --benchmark-only``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from test_launches import Hopper
from torch import Tensor

from mpo_kernels import MPOShape
from mpo_kernels.backends.triton import panels
from mpo_kernels.planning.plan import Gradients, Plan
from mpo_kernels.testing import random_cores


class Idle(Hopper):
    """A driver whose launches do nothing."""

    class utils:
        @staticmethod
        def load_binary(*_: Any) -> tuple[int, ...]:
            return 1, 1, 32, 0, 1024

        @staticmethod
        def get_device_properties(_: int) -> dict[str, int]:
            return {"max_shared_mem": 227 << 10, "warpSize": 32, "max_num_regs": 65536}

    def launcher_cls(self, *_: Any) -> Any:
        return lambda *_: None


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A light step of the exact five cores as a device's host takes it, launches aside."""
    shape = MPOShape((3, 4, 4, 4, 4), (4, 4, 8, 6, 4), (12, 192, 384, 16))
    cores = random_cores(shape, torch.bfloat16)
    x, dy, bias = (torch.randn(size).bfloat16() for size in ((1, 768), (1, 3072), (3072,)))
    y, light = torch.empty_like(dy), Gradients(True, (True, True, False, True, True))
    forward = Plan("panels", "columns", (2, 3), 1, 8, 0, 0, 0.0)
    backward = Plan("panels", "rows", (2, 3), 1, 6, 0, 0, 0.0)
    # What the device would do meanwhile.
    monkeypatch.setattr(torch, "mm", lambda *_, out: out)
    monkeypatch.setattr(Tensor, "new_zeros", Tensor.new_empty)
    monkeypatch.setattr(triton.runtime.driver, "_active", Idle())

    def run() -> None:
        panels.forward(x, cores, bias, y, forward)
        panels.backward(dy, x, cores, light, backward)

    return run


def test_time(step: Callable[[], None], benchmark: Any) -> None:
    benchmark.pedantic(step, rounds=50, iterations=10, warmup_rounds=2)


def test_calls_do_not_grow(step: Callable[[], None]) -> None:
    """What the time consists of, which no other work on the machine changes."""
    step()  # compiles
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    assert calls <= 1000
