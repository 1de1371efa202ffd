"""What is measured, and how: time, peak memory, bytes saved for backward, the machine's limits."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from mpo_kernels.calibration import copy_rate, gemm_rate, seconds

# Kineto announces every profile on stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

Key = TypeVar("Key", bound=Hashable)

# A sample is as many calls as fill this, so that the clock's and the loop's cost vanish.
SAMPLE_SECONDS = 1e-3
MAX_REPEATS = 30


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: the median and quartiles of ``repeats`` samples.

    ``captured``: on CUDA, whether replays of a graph were timed, or calls with the host's time in
    them, as where the way cannot be captured.
    """

    median_us: float
    q1_us: float
    q3_us: float
    repeats: int
    captured: bool | None = None

    def divided(self, by: int) -> Timing:
        """Of one of so many alike."""
        parts = {name: getattr(self, name) / by for name in ("median_us", "q1_us", "q3_us")}
        return replace(self, **parts)


def interleave(
    calls: Mapping[Key, Callable[[], Any]],
    budget: float,
    device: torch.device,
    min_repeats: int = 3,
    capture: bool = True,
) -> dict[Key, Timing]:
    """Time some calls against each other, each warmed up already.

    Each gets samples for about ``budget`` seconds, at least ``min_repeats`` and at most 30, spread
    evenly over the same rounds in shuffled order: a drift of the machine hits all alike. On CUDA a
    sample is one replay of the call, captured (or one call, unless ``capture``), with a cold
    second-level cache.
    """
    if device.type == "cuda":
        return _interleave_cold(calls, budget, min_repeats, device, capture)
    loops, samples = {}, {}
    for key, call in calls.items():
        first = seconds(call, 1, device)
        loops[key] = max(1, round(SAMPLE_SECONDS / first))
        # A call that fills its sample alone is a sample; a shorter one was only a probe.
        samples[key] = [first if loops[key] == 1 else seconds(call, loops[key], device)]
    return _rounds(
        lambda key: seconds(calls[key], loops[key], device), samples, budget, min_repeats, loops
    )


def _rounds(
    sample: Callable[[Key], float],
    samples: dict[Key, list[float]],
    budget: float,
    min_repeats: int,
    loops: Mapping[Key, int] | None = None,
) -> dict[Key, Timing]:
    """Add to the first samples until the budget is spent; a sample is so many ``loops``."""
    repeats = {}
    for key, (first,) in samples.items():
        wanted = int(budget / (first * (loops[key] if loops else 1)))
        repeats[key] = min(max(wanted, min_repeats), MAX_REPEATS) - 1
    rounds, shuffle, keys = max(repeats.values(), default=0), random.Random(0), list(samples)
    for turn in range(rounds):
        shuffle.shuffle(keys)
        for key in keys:
            if (turn + 1) * repeats[key] // rounds > turn * repeats[key] // rounds:
                samples[key].append(sample(key))
    return {key: _timing(found) for key, found in samples.items()}


def _interleave_cold(
    calls: Mapping[Key, Callable[[], Any]],
    budget: float,
    min_repeats: int,
    device: torch.device,
    capture: bool,
) -> dict[Key, Timing]:
    # Larger than any second-level cache: writing it leaves nothing of the call's operands there.
    flush = torch.empty(2**28, dtype=torch.uint8, device=device)
    graphs = {key: captured(call) if capture else None for key, call in calls.items()}

    def sample(key: Key) -> float:
        graph = graphs[key]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        if graph is None:  # else the host would be ahead by as long as that takes
            torch.cuda.synchronize(device)
        start.record()
        calls[key]() if graph is None else graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    timed = _rounds(sample, {key: [sample(key)] for key in calls}, budget, min_repeats)
    return {key: replace(timing, captured=graphs[key] is not None) for key, timing in timed.items()}


def captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph | None:
    """The call in a CUDA graph; None where it cannot be in one (it waits for the device)."""
    graph, before, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()
    try:
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            call()
        before.wait_stream(stream)
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        # A capture that fails leaves its stream current.
        torch.cuda.set_stream(before)
        torch.cuda.synchronize()
        return None
    return graph


def host_microseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of the host's time to start a call, the least of five times twenty calls."""

    def one() -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(20):
            call()
        taken = time.perf_counter() - start
        torch.cuda.synchronize(device)
        return taken / 20

    return 1e6 * min(one() for _ in range(5))


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
        least_us: what a kernel with next to nothing to do takes in a captured stack.
    """

    macs_per_second: float
    bytes_per_second: float
    gemm_size: int
    copy_bytes: int
    least_us: float = 0.0

    def floor_us(self, macs: int, moved: int) -> float:
        """Microseconds below which no call of these multiply-adds and bytes can be."""
        seconds = max(macs / self.macs_per_second, moved / self.bytes_per_second)
        return max(1e6 * seconds, self.least_us)


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Takes about two seconds on two cores."""
    size, nbytes = (2048, 2**28) if device.type == "cpu" else (8192, 2**30)
    rates, least = (gemm_rate(device, dtype, size), copy_rate(device, nbytes)), 1.5
    return Roofline(*rates, size, nbytes, least if device.type == "cuda" else 0.0)
