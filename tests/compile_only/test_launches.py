"""Calls as a device would see them, compiled and not run: what is compiled, and how often."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import mpo_kernels as mk
from mpo_kernels import MPOShape
from mpo_kernels.backends.triton import backend, chain, device, matrix, panels, product
from mpo_kernels.backends.triton.backend import TritonBackend
from mpo_kernels.backends.triton.device import precision
from mpo_kernels.planning.figures import default_figures
from mpo_kernels.planning.plan import Gradients, Plan
from mpo_kernels.testing import HostTransfers, random_cores


class Hopper:
    """What triton asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels compiled, in order; CPU tensors stand for a device's."""
    names: list[str] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    def note(*, fn: Any, **_: Any) -> None:
        names.append(fn.name.rpartition(".")[2])

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    monkeypatch.setattr(device, "unsupported", lambda *_: None)
    monkeypatch.setattr(device, "unavailable", lambda: None)
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Hopper())
    with mk.use_backend("triton"):
        yield names
    triton.runtime.driver._active = before


def test_fifty_row_counts_compile_few_kernels(compiled: list[str]) -> None:
    layer = mk.MPOLinear(80, 120, MPOShape((8, 10), (10, 12), 5), dtype=torch.bfloat16)
    layer.requires_grad_(False)
    rows = list(range(1, 4000, 80))
    for count in rows:
        layer(torch.randn(count, 80, dtype=torch.bfloat16))
    assert len(rows) == 50 and 1 <= len(compiled) <= 16, compiled
    before = len(compiled)
    for count in (2, 16, 17, 1000, 1024, 3333):
        layer(torch.randn(count, 80, dtype=torch.bfloat16))
    assert len(compiled) <= before + 2


def test_a_training_step_launches_only_what_it_needs(compiled: list[str]) -> None:
    cores = random_cores(MPOShape((16, 64), (64, 16), 16), torch.bfloat16)
    x, dy = (torch.randn(4096, 1024, dtype=torch.bfloat16) for _ in range(2))

    def kernels(*needs: bool) -> set[str]:
        compiled.clear()
        gradients = Gradients(needs[0], needs[1:])
        plan = TritonBackend().plan_for(4096, x.dtype, x.device, cores, gradients, (1024, 1024))
        fused = next(p for p in plan.candidates if p.algorithm == "fused")
        assert len(fused.launches) == sum(needs)
        TritonBackend().linear_backward(dy, x, cores, gradients, fused)
        return set(compiled)

    assert kernels(True, False, False) == {"matrix_kernel"}
    assert kernels(False, True, True) == {"matrix_kernel", "sum_kernel"}


@pytest.mark.parametrize("early", [False, True])
def test_products_begin_early_where_the_device_can(
    early: bool, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "can_begin_early", lambda device: early)
    panels.merging_task.cache_clear()  # with what was compiled for it
    options = []
    made = JITFunction.warmup

    def warmup(self: Any, *args: Any, **given: Any) -> Any:
        options.append(given)
        return made(self, *args, **given)

    monkeypatch.setattr(JITFunction, "warmup", warmup)
    panels.merge(random_cores(MPOShape((4, 8), (4, 8), 16), torch.bfloat16), ())
    assert compiled == ["product_kernel"]
    assert [given.get("launch_pdl", False) for given in options] == [early]
    for name in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"):
        assert device.begins_early(name) == (name in ("sm_90", "sm_100", "sm_120"))


def test_an_architecture_that_is_too_old_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "unavailable", lambda: None)
    monkeypatch.setattr(device, "architecture", lambda index: f"sm_{index}")
    assert device._unsupported_architecture(90) is None
    reason = device.unsupported(torch.device("cuda", 75), torch.bfloat16)
    assert reason is not None and "sm_75" in reason
    assert "not in torch.float64" in str(
        device.unsupported(torch.device("cuda", 90), torch.float64)
    )


def test_what_the_interpreter_cannot_multiply_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "unavailable", lambda: None)
    monkeypatch.setattr(device, "interpreted", lambda: True)
    cpu = torch.device("cpu")
    assert "takes bf16 for integers" in str(device.unsupported(cpu, torch.bfloat16))
    assert device.unsupported(cpu, torch.float16) is None


def test_tf32_only_where_torch_allows_it() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        assert precision(torch.float32) == "ieee"
        matmul.fp32_precision = "tf32"
        assert precision(torch.float32) == "tf32" and precision(torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = before


@dataclass
class Launches(TorchDispatchMode):
    """What a device would be asked to run, and the largest tensor that is made."""

    count: int = 0
    largest: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        views = ("view", "slice", "select", "t", "detach", "_unsafe_view")
        if func.is_view or name in views or not isinstance(result, Tensor):
            return result
        self.largest = max(self.largest, result.numel())
        self.count += name not in ("empty", "new_empty", "empty_like") and result.numel() > 0
        return result


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    counted = Launches()

    def count(*_: Any, **__: Any) -> None:
        counted.count += 1

    for module in (product, chain, matrix):
        monkeypatch.setattr(module, "launch", count)
    monkeypatch.setattr(product, "interpreted", lambda: True)  # nothing is compiled
    monkeypatch.setattr(device, "unavailable", lambda: None)
    monkeypatch.setattr(device, "interpreted", lambda: True)
    figures = replace(default_figures("cuda", torch.bfloat16, 1), host_seconds=0.0)
    monkeypatch.setattr(backend, "device_figures", lambda *_: figures)
    return counted


def _step(
    launches: Launches, shape: MPOShape, rows: int, trained: Sequence[bool]
) -> tuple[list[Plan], list[int]]:
    """What the planner chooses for y and for the gradients, and the launches of each."""
    cores, features = random_cores(shape, torch.bfloat16), (shape.in_features, shape.out_features)
    x, dy = (torch.zeros(rows, size, dtype=torch.bfloat16) for size in features)
    bias = torch.zeros(shape.out_features, dtype=torch.bfloat16)
    plans, counts, triton_backend = [], [], TritonBackend()
    launches.largest = 0
    for asked in (None, Gradients(True, tuple(trained))):
        plan = triton_backend.plan_for(rows, x.dtype, x.device, cores, asked, features)
        launches.count = 0
        with launches, HostTransfers() as found:
            if asked is None:
                triton_backend.linear(x, cores, bias, shape.out_features, plan)
            else:
                triton_backend.linear_backward(dy, x, cores, asked, plan)
        assert not found.names
        plans.append(plan)
        counts.append(launches.count)
    return plans, counts


@pytest.mark.parametrize("rows", [1, 2, 16, 256, 4096])
def test_launches_of_the_exact_five_cores_as_the_planner_chooses(
    rows: int, launches: Launches
) -> None:
    shape = MPOShape.balanced(768, 3072, 5)
    plans, counts = _step(launches, shape, rows, [k != shape.central for k in range(5)])
    assert [plan.algorithm for plan in plans] == ["panels", "panels"]
    # One more sums the bias's gradient.
    assert counts == [7, 19]
    assert launches.largest <= max(768 // 2, rows) * 3072


@pytest.mark.parametrize("rows", [1, 16, 100, 1000])
@pytest.mark.parametrize(
    "shape",
    [
        MPOShape.balanced(384, 384, 2, 16),
        MPOShape.balanced(257, 263, 2, 8),
        MPOShape.balanced(257, 263, 2),
        MPOShape.balanced(1021, 1031, 2),
        MPOShape.balanced(194, 303, 3),
        MPOShape.balanced(768, 3072, 4),
        MPOShape.skewed(384, 1536, 4, 384, 32),
    ],
    ids=str,
)
def test_no_tensor_of_more_than_half_of_w(shape: MPOShape, rows: int, launches: Launches) -> None:
    for trained in ([True] * shape.num_cores, [k != shape.central for k in range(shape.num_cores)]):
        _step(launches, shape, rows, trained)
        own = max(math.prod(s) for s, t in zip(shape.core_shapes, trained, strict=True) if t)
        padded = math.prod(shape.in_factors) * math.prod(shape.out_factors)
        of_rows = rows * max(math.prod(shape.in_factors), math.prod(shape.out_factors))
        # But for the sums of a core's gradient, of its size.
        assert launches.largest <= max(padded // 2, of_rows, own)
