"""One launch of the decode chain: what torch has, as the addresses that ``csrc`` takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from mpo_kernels.backends.cuda import extension

if TYPE_CHECKING:
    from mpo_kernels._cuda import Chain

DTYPES = (torch.float16, torch.bfloat16)

# Sizes and strides [D_in, i, j, D_out] of a core, and whether its address is divisible by 16.
Layout: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], bool]


def layout_of(core: Tensor) -> Layout:
    """What a schedule depends on."""
    return core.shape, core.stride(), core.data_ptr() % 16 == 0


@lru_cache(maxsize=4096)
def chain_of(
    layouts: tuple[Layout, ...],
    rows: int,
    features: tuple[int, int],
    from_left: bool,
    element: torch.dtype,
    stored: torch.dtype,
    limits: tuple[int, int, int],
) -> Chain | None:
    """The schedule for one problem, None where the kernels do not serve its sizes or the device."""
    names = (str(dtype).removeprefix("torch.") for dtype in (element, stored))
    try:
        return extension.load().Chain(layouts, rows, *features, from_left, *names, limits)
    except (RuntimeError, ValueError):
        return None


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now goes into a graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class Counters:
    """Zeros that a launch finds and leaves, never shared by two launches that may overlap.

    Launches on one stream follow each other. A graph may be replayed beside anything else, so what
    is captured takes places that nothing takes again. None is from torch's allocator, which may
    give memory of a graph's warm-up to somebody else.
    """

    SIZE = 1 << 16

    def __init__(self) -> None:
        # Address and count; of a device's last one also how many are taken.
        self._of_stream: dict[tuple[int, int], tuple[int, int]] = {}
        self._of_graphs: dict[int, tuple[int, int]] = {}

    def take(self, count: int, device: torch.device, stream: int) -> tuple[int, Tensor | None]:
        """The address of ``count`` int32 zeros, and what has to live until they are used."""
        index = device.index or 0
        if is_capturing(device):
            address, used = self._of_graphs.get(index, (0, self.SIZE))
            if used + count > self.SIZE:
                # A capture can allocate nothing else: zeros that are cleared at every replay.
                zeros = torch.zeros(count, dtype=torch.int32, device=device)
                return zeros.data_ptr(), zeros
            self._of_graphs[index] = (address, used + count)
            return address + 4 * used, None
        address, size = self._of_stream.get((index, stream), (0, 0))
        if size < count:
            size, make = max(count, self.SIZE), extension.load().make_counters
            address = make(index, size)
            self._of_stream[index, stream] = (address, size)
            if index not in self._of_graphs:
                self._of_graphs[index] = (make(index, self.SIZE), 0)
        return address, None


counters = Counters()


def stream_of(device: torch.device) -> int:
    """The address of the current stream."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def decode(
    x: Tensor,
    cores: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Tensor | None,
    out_features: int,
    chain: Chain,
) -> Tensor:
    """``y [rows, out_features]`` of ``x [rows, in_features]``, fp16 or bf16.

    Args:
        x: any strides.
        cores: two or three, laid out as ``chain`` was made for.
        scales: fp32 ``[D]`` of each bond where cores are quantised, else none.
        bias: ``[out_features]`` of x's dtype.
        chain: the schedule, for these rows.
    """
    device = x.device
    x_row, x_column = x.stride()
    y = x.new_empty((x.shape[0], out_features))
    stream, bias_address, partials, zeros, held = stream_of(device), 0, 0, 0, None
    if bias is not None:
        bias = bias.contiguous()
        bias_address = bias.data_ptr()
    if chain.counters:
        space = x.new_empty(chain.partials, dtype=torch.float32)
        partials = space.data_ptr()
        zeros, held = counters.take(chain.counters, device, stream)
    chain.launch(
        x.data_ptr(),
        x_row,
        x_column,
        [core.data_ptr() for core in cores],
        [scale.data_ptr() for scale in scales],
        bias_address,
        y.data_ptr(),
        partials,
        zeros,
        device.index or 0,
        stream,
    )
    del held
    return y
