"""What is measured, and how: time, peak memory, bytes saved for backward, the machine's limits."""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from mpo_kernels.figures import copy_rate, gemm_rate, seconds

# Kineto announces every profile on stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

Key = TypeVar("Key", bound=Hashable)

# A sample is as many calls as fill this, so that the clock's and the loop's cost vanish.
SAMPLE_SECONDS = 1e-3
MAX_REPEATS = 30


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: the median and quartiles of ``repeats`` samples."""

    median_us: float
    q1_us: float
    q3_us: float
    repeats: int


def interleave(
    calls: Mapping[Key, Callable[[], Any]],
    budget: float,
    device: torch.device,
    min_repeats: int = 3,
) -> dict[Key, Timing]:
    """Time some calls against each other, each warmed up already.

    Each gets samples for about ``budget`` seconds, at least ``min_repeats`` and at most 30, spread
    evenly over the same rounds in shuffled order: a drift of the machine hits all alike.
    """
    samples: dict[Key, list[float]] = {}
    loops, repeats = {}, {}
    for key, call in calls.items():
        first = seconds(call, 1, device)
        loops[key] = max(1, round(SAMPLE_SECONDS / first))
        # A call that fills its sample alone is a sample; a shorter one was only a probe.
        samples[key] = [first] if loops[key] == 1 else []
        wanted = int(budget / (first * loops[key]))
        repeats[key] = min(max(wanted, min_repeats), MAX_REPEATS) - len(samples[key])
    rounds, shuffle, keys = max(repeats.values(), default=0), random.Random(0), list(calls)
    for turn in range(rounds):
        shuffle.shuffle(keys)
        for key in keys:
            if (turn + 1) * repeats[key] // rounds > turn * repeats[key] // rounds:
                samples[key].append(seconds(calls[key], loops[key], device))
    return {key: _timing(samples[key]) for key in calls}


def _timing(samples: list[float]) -> Timing:
    us = [1e6 * sample for sample in samples]
    # Quantiles want two; of one sample all three are itself.
    quartiles = statistics.quantiles(us * 2 if len(us) == 1 else us, n=4, method="inclusive")
    q1, median, q3 = (round(quartile, 2) for quartile in quartiles)
    return Timing(median, q1, q3, len(us))


@dataclass(frozen=True)
class Memory:
    """Bytes of one call.

    Attributes:
        peak: most bytes that lived at once, beyond those that lived before the call.
        saved: storages kept for backward, each counted once, the parameters' included.
        saved_activations: the same without the parameters' storages.
    """

    peak: int
    saved: int
    saved_activations: int


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yields what gives :attr:`Memory.peak` of the block, afterwards.

    On a CPU from the allocator's own events, as the profiler reports them: it sees inside compiled
    graphs and custom operators, where a dispatch mode does not. A GEMM library's private workspace
    is not seen. On CUDA from the caching allocator's counters.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        torch.cuda.synchronize(device)
        return
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        yield lambda: _peak_of(profile)


def _peak_of(profile: torch.autograd.profiler.profile) -> int:
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(accumulate((e.nbytes() for e in events), initial=0))


@contextmanager
def saved_bytes(parameters: Iterable[Tensor]) -> Iterator[Callable[[], tuple[int, int]]]:
    """Yields what gives :attr:`Memory.saved` and ``.saved_activations`` of the block."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # The graph holds it to the end of the block, so its address is given to no other.
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def totals() -> tuple[int, int]:
        return sum(kept.values()), sum(size for place, size in kept.items() if place not in own)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield totals


@dataclass(frozen=True)
class Roofline:
    """What this machine did in this run: the best large GEMM and the best large copy.

    Attributes:
        macs_per_second: multiply-adds of a square GEMM in the run's dtype.
        bytes_per_second: of a copy past every cache, read and write counted.
        gemm_size: rows and columns of that GEMM's matrices.
        copy_bytes: size of what was copied.
    """

    macs_per_second: float
    bytes_per_second: float
    gemm_size: int
    copy_bytes: int

    def floor_us(self, macs: int, moved: int) -> float:
        """Microseconds below which no call of these multiply-adds and bytes can be."""
        return 1e6 * max(macs / self.macs_per_second, moved / self.bytes_per_second)


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Takes about two seconds on two cores."""
    size, nbytes = (2048, 2**28) if device.type == "cpu" else (8192, 2**30)
    return Roofline(gemm_rate(device, dtype, size), copy_rate(device, nbytes), size, nbytes)
