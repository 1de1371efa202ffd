"""Which devices and dtypes the kernels serve, what a device can hold, and launches on it."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpo_kernels.backends.triton.tiles import LIMITS, Limits, Strides
from mpo_kernels.planning import measured

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_TRITON = (3, 5)


def interpreted() -> bool:
    """Whether triton runs the kernels on the CPU, in numpy (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def installed() -> str | None:
    """Why triton cannot be used, or None."""
    for name in ("triton", "pytorch-triton-rocm"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < MIN_TRITON:
            return f"triton {version} is older than {MIN_TRITON[0]}.{MIN_TRITON[1]}"
        return None
    return "triton is not installed; pip install triton"


def unavailable() -> str | None:
    """Why no kernel can run here, or None."""
    if reason := installed():
        return reason
    if not interpreted() and not torch.cuda.is_available():
        return "no CUDA or ROCm device"
    return None


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute on this device in this dtype, or None."""
    if reason := unavailable():
        return reason
    if dtype not in DTYPES:
        return f"the kernels compute in fp16, bf16 and fp32, not in {dtype}"
    if device.type == "cpu":
        if not interpreted():
            return "the kernels need a CUDA or ROCm device, not a CPU"
        is_wrong = dtype == torch.bfloat16 and not _interprets_bf16()
        return "triton's interpreter takes bf16 for integers" if is_wrong else None
    if device.type != "cuda":
        return f"the kernels need a CUDA or ROCm device, not {device.type}"
    return _unsupported_architecture(device.index)


@cache
def _interprets_bf16() -> bool:
    """Whether the interpreter's 1 · 1 is 1: as it comes, it multiplies the bits."""
    import numpy as np
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    one = TensorHandle(np.full((1, 1), 0x3F80, np.uint16), bfloat16)
    zero = TensorHandle(np.zeros((1, 1), np.float32), float32)
    return bool(InterpreterBuilder().create_dot(one, one, zero, None, 0).data == 1)


@cache
def _unsupported_architecture(index: int) -> str | None:
    name = architecture(index)
    if name.startswith("sm_"):
        old = int(name[3:]) < 80
        return f"the kernels need compute capability 8.0, not that of {name}" if old else None
    return None if name in LIMITS else f"the kernels were never compiled for {name}"


@cache
def architecture(index: int) -> str:
    """``"sm_90"``, ``"gfx942"``: what device ``index`` is compiled for."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def source_hash() -> str:
    """Of the files of this folder that hold kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if b"@triton.jit" in (source := path.read_bytes()):
            digest.update(path.name.encode() + b"\0" + source + b"\0")
    return digest.hexdigest()[:16]


@cache
def limits(device: torch.device) -> Limits:
    """The device's limits; rates are those of the nearest architecture with figures."""
    if device.type == "cpu":
        return LIMITS["sm_90"]
    name = architecture(device.index)
    if name.startswith("sm_"):
        known = [
            arch for arch in LIMITS if arch.startswith("sm_") and int(arch[3:]) <= int(name[3:])
        ]
        nearest = max(known, key=lambda arch: int(arch[3:]))
    else:
        nearest = "gfx942"
    properties = torch.cuda.get_device_properties(device.index)
    return replace(
        LIMITS[nearest],
        name=measured.device_name(device),
        multiprocessors=properties.multi_processor_count,
        shared_memory=getattr(
            properties, "shared_memory_per_block_optin", LIMITS[nearest].shared_memory
        ),
    )


def precision(dtype: torch.dtype) -> str:
    """``"tf32"`` for fp32 operands where torch's own products may use it, else ``"ieee"``."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def readable(part: Tensor, *block: int) -> Tensor:
    """``part [in, out, D]``, copied only where tiles of ``block`` would read it in short runs."""
    runs = [
        min(size, wanted)
        for size, wanted, stride in zip(part.shape, block, part.stride(), strict=True)
        if stride == 1
    ]
    return part if max(runs, default=0) * part.element_size() >= 16 else part.contiguous()


def strides_of(a: Tensor, b: Tensor | None = None) -> Strides:
    """Strides of one or two parts ``[in, out, D]``."""
    return Strides(*a.stride(), *(b.stride() if b is not None else (0, 0, 0)))


@cache
def can_begin_early(device: torch.device) -> bool:
    """Whether a kernel can be set up on it while the one before it runs."""
    return device.type == "cuda" and begins_early(architecture(device.index))


def begins_early(name: str) -> bool:
    """Whether an architecture has programmatic dependent launch."""
    return name.startswith("sm_") and int(name[3:]) >= 90


def options_of(tile: Any, early: bool = False) -> dict[str, Any]:
    """What triton is told beside a kernel's arguments."""
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return options | {"launch_pdl": True} if early else options  # unknown to other vendors'


def launch(kernel: Any, grid: tuple[int, ...], tile: Any, *args: Any, early: bool = False) -> None:
    """Run ``kernel`` on the device of its first argument.

    Args:
        early: it is set up while the one before it runs, whose end it waits for itself.

    Raises:
        RuntimeError: the launch failed; the text names the kernel, its grid and its tile.
    """
    device = args[0].device
    try:
        if device.type == "cpu" or device.index == torch.cuda.current_device():
            kernel[grid](*args, **options_of(tile, early))
        else:
            with torch.cuda.device(device):
                kernel[grid](*args, **options_of(tile, early))
    except Exception as error:
        inputs = [tuple(a.shape) if isinstance(a, Tensor) else a for a in args]
        name = getattr(kernel, "__name__", kernel)
        raise RuntimeError(f"{name} failed on grid {grid}, inputs {inputs}: {error}") from error
