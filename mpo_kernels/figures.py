"""What a device does in a second: defaults, or what `calibrate` measured on it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from mpo_kernels import measured

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceFigures:
    """What a device does in a second, as far as the choice between candidates needs it.

    Attributes:
        name: device type, for the reader.
        macs_per_second: multiply-adds of a large GEMM.
        bytes_per_second: of a large copy, read and write counted.
        launch_seconds: of one library call, whatever it does: on a CPU all of it, on a GPU what its
            kernel takes at least.
        host_seconds: of the host for one library call and what Python adds, beside the device;
            0 on a CPU.
        side: half of a GEMM's rate is left where one of its sides is this short.
        block_bytes: intermediates of a chain that stay in cache together.
        panel_bytes: workspace of a panel, which is also at most half of W; one j is the floor.
    """

    name: str
    macs_per_second: float
    bytes_per_second: float
    launch_seconds: float
    host_seconds: float
    side: int
    block_bytes: int
    panel_bytes: int


# What calibration replaces.
_MEASURED = ("macs_per_second", "bytes_per_second", "launch_seconds", "host_seconds")


def device_figures(device: torch.device, dtype: torch.dtype) -> DeviceFigures:
    """Figures of this device; only their ratios matter for the choice."""
    return _figures(device, dtype, torch.get_num_threads())


@cache
def _figures(device: torch.device, dtype: torch.dtype, threads: int) -> DeviceFigures:
    default = default_figures(device.type, dtype, threads)
    stored = measured.get(measured.device_name(device), "figures", str(dtype))
    if stored is None:
        return default
    try:
        rates: dict[str, Any] = {name: float(stored[name]) for name in _MEASURED}
        divisors = rates["macs_per_second"], rates["bytes_per_second"]
        if not all(0 <= rate < math.inf for rate in rates.values()) or 0 in divisors:
            raise ValueError(f"expected finite figures, and rates that are not 0, got {stored}")
    except (TypeError, ValueError, KeyError) as error:
        logger.warning("calibrated figures are not used: %r", error)
        return default
    return replace(default, **rates)


def default_figures(device_type: str, dtype: torch.dtype, threads: int) -> DeviceFigures:
    """Figures of this kind of device where none was calibrated."""
    if device_type == "cpu":
        # One AVX-512 core: 30 G MAC/s in fp32, half in fp64.
        rate = 30e9 * threads * (0.5 if dtype == torch.float64 else 1.0)
        return DeviceFigures("cpu", rate, 20e9, 5e-6, 0.0, 4, 2**20 * threads, 8 * 2**20)
    # An H200: docs/planner.md has what these were fitted to.
    rate = 25e12 if dtype in (torch.float32, torch.float64) else 350e12
    return DeviceFigures(device_type, rate, 3e12, 3e-6, 24e-6, 64, 64 * 2**20, 64 * 2**20)


def calibrate(device: torch.device, dtype: torch.dtype, graphs: bool = False) -> DeviceFigures:
    """Measure this device and keep the figures for all later processes (`measured.py`).

    With ``graphs`` the host's time counts nothing: for models that are replayed from CUDA graphs.
    """
    gemm, copy = (2048, 2**28) if device.type == "cpu" else (8192, 2**30)
    launch, host = _launch_seconds(device)
    figures = {
        "macs_per_second": gemm_rate(device, dtype, gemm),
        "bytes_per_second": copy_rate(device, copy),
        "launch_seconds": launch,
        "host_seconds": 0.0 if graphs else host,
    }
    measured.put(measured.device_name(device), "figures", str(dtype), figures)
    _figures.cache_clear()
    return device_figures(device, dtype)


def gemm_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Multiply-adds a second of a square GEMM of random matrices, the best of eight."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return size**3 / min(seconds(lambda: torch.mm(a, b), 1, device) for _ in range(8))


def copy_rate(device: torch.device, nbytes: int) -> float:
    """Bytes a second of a copy, read and write counted, the best of eight."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / min(seconds(lambda: target.copy_(source), 1, device) for _ in range(8))


def _launch_seconds(device: torch.device) -> tuple[float, float]:
    """Of a small product: of the device, and of the host in a chain of two."""
    a, calls = torch.ones(8, 8, device=device), 200
    if device.type == "cpu":
        return min(seconds(lambda: torch.mm(a, a), calls, device) for _ in range(8)), 0.0
    from mpo_kernels.backends.torch import linear  # it asks for figures itself

    cores = [a.view(1, 1, 8, 8), a.view(8, 8, 1, 1)]
    host = min(seconds(lambda: linear(a, cores, None, 8), calls, device) for _ in range(8)) / 2
    graph = torch.cuda.CUDAGraph()
    # By default the stream that was captured on first, which may be another device's.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
        for _ in range(calls):
            torch.mm(a, a)
    return min(seconds(graph.replay, 1, device) for _ in range(8)) / calls, host


def seconds(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Wall-clock seconds a call, over ``calls`` of them, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls
