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


def layouts_of(cores: Sequence[Tensor]) -> tuple[Layout, ...]:
    """What a schedule depends on."""
    return tuple([(core.shape, core.stride(), core.data_ptr() % 16 == 0) for core in cores])


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
    # Outside: a library that is not there is not a problem without a schedule.
    schedule = extension.load().Chain
    try:
        return schedule(layouts, rows, *features, from_left, *names, limits)
    except (RuntimeError, ValueError):
        return None


class Workspace:
    """Memory for the sums over splits, never shared by two launches that may overlap.

    Launches on one stream follow each other. A graph may be replayed beside anything else, so what
    is captured takes counters that nothing takes again. None of it is from torch's allocator, which
    may give memory of a graph's warm-up to somebody else, save what a graph itself owns.
    """

    COUNTERS = 1 << 16
    PARTIALS = 1 << 18

    def __init__(self) -> None:
        # Address and sizes of a stream's counters and the partial sums behind them.
        self._of_stream: dict[tuple[int, int], tuple[int, int, int]] = {}
        # Address of a device's counters for graphs, and how many are taken.
        self._of_graphs: dict[int, tuple[int, int]] = {}

    def take(self, chain: Chain, like: Tensor, stream: int) -> tuple[int, int, tuple[Tensor, ...]]:
        """Addresses of partials and counters, and what has to live until they are used."""
        module, index = extension.load(), like.device.index or 0
        count, partials = chain.counters, chain.partials
        if module.is_capturing(stream):
            return self._captured(count, partials, like)
        address, counters, size = self._of_stream.get((index, stream), (0, 0, 0))
        if count > counters or partials > size:
            counters, size = max(count, self.COUNTERS), max(partials, 2 * size, self.PARTIALS)
            address = module.make_zeros(index, counters + size)
            self._of_stream[index, stream] = (address, counters, size)
            if index not in self._of_graphs:
                self._of_graphs[index] = (module.make_zeros(index, self.COUNTERS), 0)
        return address + 4 * counters, address, ()

    def _captured(
        self, count: int, partials: int, like: Tensor
    ) -> tuple[int, int, tuple[Tensor, ...]]:
        space = like.new_empty(partials, dtype=torch.float32)
        index = like.device.index or 0
        address, used = self._of_graphs.get(index, (0, self.COUNTERS))
        if used + count > self.COUNTERS:
            # A capture can allocate nothing else: zeros that are cleared at every replay.
            zeros = like.new_zeros(count, dtype=torch.int32)
            return space.data_ptr(), zeros.data_ptr(), (space, zeros)
        self._of_graphs[index] = (address, used + count)
        return space.data_ptr(), address + 4 * used, (space,)


workspace = Workspace()


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
    stream, bias_address, partials, counters = stream_of(device), 0, 0, 0
    held: tuple[Tensor, ...] = ()
    if bias is not None:
        bias = bias.contiguous()
        bias_address = bias.data_ptr()
    if chain.counters:
        partials, counters, held = workspace.take(chain, x, stream)
    chain.launch(
        x.data_ptr(),
        x_row,
        x_column,
        [core.data_ptr() for core in cores],
        [scale.data_ptr() for scale in scales],
        bias_address,
        y.data_ptr(),
        partials,
        counters,
        device.index or 0,
        stream,
    )
    del held
    return y
