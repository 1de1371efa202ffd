"""The compiled kernels, ``mpo_kernels._cuda``: loaded when first asked for, or why they are not."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

# What this package speaks; mpo::kInterface of the library must be the same.
INTERFACE = 2

REMEDY = "install the package with MPO_KERNELS_BUILD_CUDA=1 where nvcc, CMake and ninja are on PATH"


@cache
def loaded() -> tuple[ModuleType | None, str]:
    """The module, or None and why."""
    try:
        module = import_module("mpo_kernels._cuda")
    except ModuleNotFoundError:
        return None, f"the CUDA kernels were not built; {REMEDY}"
    except ImportError as error:
        return None, f"the CUDA kernels cannot be loaded ({error}); {REMEDY}"
    if module.INTERFACE != INTERFACE:
        found = f"interface {module.INTERFACE}, expected {INTERFACE}"
        return None, f"the CUDA kernels are of another version of the package ({found}); {REMEDY}"
    return module, ""


def load() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it is not there, with the remedy.
    """
    module, reason = loaded()
    if module is None:
        raise RuntimeError(reason)
    return module


def source_hash() -> str | None:
    """Of the files of ``csrc`` that the library was made of, as it names them; None without one."""
    return getattr(loaded()[0], "SOURCES", None)


@cache
def unavailable() -> str | None:
    """Why the kernels cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.version.hip:
        return "the CUDA kernels do not run on ROCm devices"
    module, reason = loaded()
    return reason if module is None else None


@cache
def unsupported(device: torch.device) -> str | None:
    """Why the kernels cannot compute on this device, or None."""
    if device.type != "cuda":
        return f"the kernels need a CUDA device, not {device.type}"
    if reason := unavailable():
        return reason
    try:
        architecture = limits(device)[0]
    except RuntimeError as error:
        return f"{error}; {REMEDY}"
    if architecture < 80:
        return f"the kernels need compute capability 8.0, not that of sm_{architecture}"
    return None


@cache
def limits(device: torch.device) -> tuple[int, int]:
    """Architecture of the code that runs (80 for 8.0), and multiprocessors."""
    return load().limits(torch.cuda.current_device() if device.index is None else device.index)
