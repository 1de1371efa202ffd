"""The kernels on a CPU, in triton's interpreter; these tests need a process of their own.

The interpreter keeps bf16 as 16-bit integers and multiplies those, so products are made of fp32
copies here. Every buffer lies between guard bands, NaN for reads, checked after writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from guards import Guards
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("run tests/interpreter by itself, with TRITON_INTERPRET=1")

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _exact_bf16_dot(plain: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        def widened(handle: Any) -> Any:
            if handle.dtype.scalar != tl.bfloat16:
                return handle
            bits = handle.data.astype(np.uint32) << 16
            return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

        return plain(self, widened(a), widened(b), d, *rest)

    return create_dot


interpreter.InterpreterBuilder.create_dot = _exact_bf16_dot(
    interpreter.InterpreterBuilder.create_dot
)


@pytest.fixture(autouse=True)
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guards]:
    """Every buffer that the code under test allocates is poisoned and guarded."""
    torch.manual_seed(0)
    guards = Guards()
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
