"""The kernels in triton's interpreter, on a CPU, or on a device: in a process of their own.

With ``TRITON_INTERPRET=1`` tensors are on the CPU. The interpreter multiplies bf16 as the 16-bit
integers it keeps, so products are made of fp32 copies here, and it cuts fp32 off where a device
rounds to the nearest bf16, so it is made to round. Every buffer lies between guard bands,
NaN for reads, checked after writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from guards import Guards
from torch import Tensor
from triton.runtime import interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    raise pytest.UsageError("run tests/kernels with TRITON_INTERPRET=1, or where there is a GPU")


def _exact_bf16_dot(plain: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        def widened(handle: Any) -> Any:
            if handle.dtype.scalar != tl.bfloat16:
                return handle
            bits = handle.data.astype(np.uint32) << 16
            return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

        return plain(self, widened(a), widened(b), d, *rest)

    return create_dot


def _nearest_bf16(plain: Callable[..., Any]) -> Callable[..., Any]:
    def create_fp_trunc(self: Any, src: Any, kind: Any) -> Any:
        if (src.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return plain(self, src, kind)
        nearest = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
        return interpreter.TensorHandle(nearest.view(torch.uint16).numpy(), tl.bfloat16)

    return create_fp_trunc


if INTERPRETED:
    # A third of the time: nothing here is large enough for an offset to overflow.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )
    interpreter.InterpreterBuilder.create_fp_trunc = _nearest_bf16(
        interpreter.InterpreterBuilder.create_fp_trunc
    )
    interpreter.InterpreterBuilder.create_dot = _exact_bf16_dot(
        interpreter.InterpreterBuilder.create_dot
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What only a device can show says so where there is none."""
    for item in items:
        if INTERPRETED and item.path.name == "test_device.py":
            item.add_marker(pytest.mark.skip(reason="needs a GPU: bench/gpu_gate.sh runs it"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def guards(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[Guards]:
    """Every buffer that the code under test allocates is poisoned and guarded."""
    torch.manual_seed(0)
    guards = Guards(device)
    new_empty = Tensor.new_empty

    def guarded(like: Tensor, *size: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        flat = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        dtype = dtype or like.dtype
        if rest or not dtype.is_floating_point:
            return new_empty(like, *size, dtype=dtype, **rest)
        return guards.empty(tuple(flat), dtype)

    def zeros(like: Tensor, *size: Any, dtype: torch.dtype | None = None) -> Tensor:
        return guarded(like, *size, dtype=dtype).zero_()

    monkeypatch.setattr(Tensor, "new_empty", guarded)
    monkeypatch.setattr(Tensor, "new_zeros", zeros)
    yield guards
    guards.check()
