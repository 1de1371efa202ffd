"""The back ends by name, and the choice between them: one computes the operators at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module

from torch import Tensor

from mpo_kernels.backends.cuda import extension
from mpo_kernels.backends.torch.backend import TorchBackend
from mpo_kernels.backends.triton import device as triton_device

NAMES = ("torch", "triton", "cuda")

logger = logging.getLogger(__name__)

_TORCH = TorchBackend()
_selected = os.environ.get("MPO_KERNELS_BACKEND") or "auto"


def available_backends() -> dict[str, tuple[bool, str]]:
    """``{name: (usable here, reason)}``."""
    triton, cuda = triton_device.unavailable(), extension.unavailable()
    return {
        "torch": (True, "any device and dtype"),
        "triton": (triton is None, triton or "fp16, bf16 and fp32 on CUDA and ROCm devices"),
        "cuda": (
            cuda is None,
            cuda or "fp16 and bf16, up to 16 rows of served layers, the rest as triton",
        ),
    }


def _checked(name: str) -> str:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"expected a back end of {['auto', *NAMES]}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with one back end inside the block, in every thread; ``"auto"`` lets it be chosen.

    The environment variable ``MPO_KERNELS_BACKEND`` sets the choice for a whole process.

    Raises:
        ValueError: a back end that is not there, on entry; inside the block, a device or dtype
            that the back end does not serve.
    """
    global _selected
    usable, reason = available_backends().get(_checked(name), (True, ""))
    if not usable:
        raise ValueError(f"the {name} back end cannot be used: {reason}")
    before, _selected = _selected, name
    try:
        yield
    finally:
        _selected = before


def selected(like: Tensor) -> TorchBackend:
    """The back end that computes now, for operands of this device and dtype.

    Raises:
        ValueError: the back end asked for by name does not serve them.
    """
    name = _checked(_selected)
    if name == "torch" or (name == "auto" and like.device.type == "cpu"):
        return _TORCH
    if name != "triton":
        reason = extension.unsupported(like.device)
        if reason is None:
            return _kernels("cuda")
        if name == "cuda":
            raise ValueError(f"the cuda back end cannot compute this: {reason}")
        _log_once("the cuda back end", reason)
    if reason := triton_device.unsupported(like.device, like.dtype):
        if name == "triton":
            raise ValueError(f"the triton back end cannot compute this: {reason}")
        _log_once("the triton back end", reason)
        return _TORCH
    return _kernels("triton")


@cache
def _kernels(name: str) -> TorchBackend:
    """Imported when first used: importing the package needs neither triton nor the extension."""
    module = import_module(f"mpo_kernels.backends.{name}.backend")
    return module.CudaBackend() if name == "cuda" else module.TritonBackend()


@cache
def _log_once(what: str, reason: str) -> None:
    logger.warning("%s is not used: %s", what, reason)
