"""What a device does in a second: defaults, or what was measured on it."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from mpo_kernels.planning import measured

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


def forget() -> None:
    """Read what was measured anew when it is next asked for."""
    _figures.cache_clear()


def default_figures(device_type: str, dtype: torch.dtype, threads: int) -> DeviceFigures:
    """Figures of this kind of device where none was calibrated."""
    if device_type == "cpu":
        # One AVX-512 core: 30 G MAC/s in fp32, half in fp64.
        rate = 30e9 * threads * (0.5 if dtype == torch.float64 else 1.0)
        return DeviceFigures("cpu", rate, 20e9, 5e-6, 0.0, 4, 2**20 * threads, 8 * 2**20)
    # An H200: docs/explanations/planner.md has what these were fitted to.
    rate = 25e12 if dtype in (torch.float32, torch.float64) else 350e12
    return DeviceFigures(device_type, rate, 3e12, 3e-6, 24e-6, 64, 64 * 2**20, 64 * 2**20)
