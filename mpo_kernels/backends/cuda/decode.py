"""A layer of few rows in thin products: what torch has, as the addresses that ``csrc`` takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mpo_kernels.backends.cuda import extension
from mpo_kernels.backends.cuda.thin import UNLIMITED, Chain

DTYPES = (torch.float16, torch.bfloat16)


@lru_cache(maxsize=4096)
def compiled(chain: Chain, element: torch.dtype, stored: torch.dtype, architecture: int) -> Any:
    """The chain as the extension holds it."""
    names = (str(dtype).removeprefix("torch.") for dtype in (element, stored))
    return extension.load().Chain(
        chain.products, chain.offsets, chain.out_features, *names, architecture >= 90
    )


class Seen:
    """Whether cores may be read before all that was enqueued earlier is done.

    Not where a kernel that writes one may still run. Torch counts the changes of a tensor in place:
    the first call after one, or on another stream, waits for all that is before it, and whatever
    follows that call on its stream finds the core written. A call is noted once it is enqueued, and
    not where it is captured: it runs at a replay, which itself waits for all that is before it, so
    that within a graph only a change since the last call that ran is waited for. Changes through
    ``.data``, in inference mode, by the replay of a graph or by what is no operator of torch are
    not counted; a tensor that is made in inference mode is never read early.
    """

    def __init__(self) -> None:
        # By the address of what torch holds of a memory, which stays its own with the reference.
        self._last: dict[int, tuple[StorageWeakRef, int, int]] = {}
        self._most = 64  # where what is gone is looked for

    def early(self, cores: Sequence[Tensor], versions: Sequence[int], stream: int) -> bool:
        """For a launch on this stream now, of cores of these :func:`versions_of`."""
        for core, version in zip(cores, versions, strict=True):
            last = self._last.get(core.untyped_storage()._cdata)
            if last is None or last[1] != version or last[0].expired():
                return False
            if last[2] != stream and not capturing():
                return False
        return True

    def note(self, cores: Sequence[Tensor], versions: Sequence[int], stream: int) -> None:
        """That a launch on this stream waits before it reads them, by which it was enqueued."""
        if capturing():
            return
        for core, version in zip(cores, versions, strict=True):
            if version == UNCOUNTED:
                continue
            storage = core.untyped_storage()
            self._last[storage._cdata] = (StorageWeakRef(storage), version, stream)
            if len(self._last) > self._most:
                here = {key: one for key, one in self._last.items() if not one[0].expired()}
                self._last, self._most = here, 2 * len(here) + 64


UNCOUNTED = -1


def versions_of(cores: Sequence[Tensor]) -> list[int]:
    """How often each was changed in place, ``UNCOUNTED`` where torch does not count."""
    return [UNCOUNTED if core.is_inference() else core._version for core in cores]


seen = Seen()


def capturing() -> bool:
    """Whether what is enqueued now goes into a graph."""
    return torch._C._cuda_isCurrentStreamCapturing()


def stream_of(device: torch.device) -> int:
    """The address of the current stream."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def decode(
    x: Tensor, cores: Sequence[Tensor], scales: Sequence[Tensor], bias: Tensor | None, chain: Chain
) -> Tensor:
    """``y [rows, out_features]`` of ``x [rows, in_features]``, fp16 or bf16.

    Args:
        x: any strides.
        cores: two or three, laid out as ``chain`` was made for.
        scales: fp32 ``[D]`` of each bond where cores are quantised, else none.
        bias: ``[out_features]`` of x's dtype.
        chain: for these rows.
    """
    device = x.device
    rows, in_features = x.shape
    if x.stride(1) != 1 < in_features or rows * x.stride(0) >= UNLIMITED:
        x = x.contiguous()
    y = x.new_empty((rows, chain.out_features))
    stream = stream_of(device)
    bias = None if bias is None else bias.contiguous()
    workspace = x.new_empty(chain.workspace, dtype=torch.uint8)
    of_bonds = list(scales)
    if not chain.from_left:
        cores, of_bonds = cores[::-1], of_bonds[::-1]
    architecture, _ = extension.limits(device)
    # Before the launch: what is changed meanwhile, by another thread, is not what it waits for.
    versions = versions_of(cores)
    early = seen.early(cores, versions, stream)
    compiled(chain, x.dtype, cores[0].dtype, architecture).launch(
        x.data_ptr(),
        x.stride(0) if rows > 1 else 0,
        [core.data_ptr() for core in cores],
        [scale.data_ptr() for scale in of_bonds],
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        workspace.data_ptr(),
        early,
        device.index or 0,
        stream,
    )
    if not early:
        seen.note(cores, versions, stream)
    return y
