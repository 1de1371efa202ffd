"""Measuring a device for the planner: what `python -m mpo_kernels calibrate` does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from mpo_kernels.backends.torch.backend import TorchBackend
from mpo_kernels.planning import measured
from mpo_kernels.planning.figures import DeviceFigures, device_figures, forget


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
    forget()
    return device_figures(device, dtype)


def gemm_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Multiply-adds a second of a square GEMM of random matrices, the best of eight."""
    a, b = (torch.randn(size, size, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    return size**3 / min(seconds(lambda: torch.mm(a, b), 1, device) for _ in range(8))


def copy_rate(device: torch.device, nbytes: int) -> float:
    """Bytes a second of a copy, read and write counted, the best of eight."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / min(seconds(lambda: target.copy_(source), 1, device) for _ in range(8))


def _launch_seconds(device: torch.device) -> tuple[float, float]:
    """Of a small product: of the device, and of the host in a chain of two."""
    a, calls = torch.ones(8, 8, dtype=torch.float32, device=device), 200
    if device.type == "cpu":
        return min(seconds(lambda: torch.mm(a, a), calls, device) for _ in range(8)), 0.0
    library = TorchBackend()
    cores = [a.view(1, 1, 8, 8), a.view(8, 8, 1, 1)]
    host = (
        min(seconds(lambda: library.linear(a, cores, None, 8), calls, device) for _ in range(8)) / 2
    )
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
