"""What a contraction costs: library calls and bytes, and a device's seconds for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mpo_kernels.planning.figures import DeviceFigures
from mpo_kernels.planning.plan import CoreShapes, Gradients, groups, merged_shape


@dataclass(frozen=True)
class Work:
    """``count`` GEMMs ``[m, k] × [k, n]`` of ``batch`` matrices, and bytes moved beside them."""

    m: int = 0
    n: int = 0
    k: int = 0
    batch: int = 1
    count: int = 1
    bytes: int = 0

    @property
    def macs(self) -> int:
        return self.m * self.n * self.k * self.batch * self.count

    def multiplying(self, figures: DeviceFigures) -> float:
        """Seconds of the multiply-adds."""
        if not self.macs:
            return 0.0
        # Short sides leave vector lanes, registers and multiprocessors idle.
        used = math.prod(side / (side + figures.side) for side in (self.m, self.n, self.k))
        return self.macs / (figures.macs_per_second * used)

    def seconds(self, figures: DeviceFigures) -> float:
        beside = self.count * figures.launch_seconds + self.bytes / figures.bytes_per_second
        return beside + self.multiplying(figures)


def exposed(operands: int, products: Sequence[Work], figures: DeviceFigures) -> float:
    """Seconds of ``operands`` bytes that are read and written beyond the products of them.

    A product moves its operands while it multiplies, so the longer of the two counts.
    """
    multiplying = sum(product.multiplying(figures) for product in products)
    return max(0.0, operands / figures.bytes_per_second - multiplying)


def time_of(
    work: Sequence[Work], figures: DeviceFigures, kernels: float = 0.0, started: float = 0.0
) -> float:
    """Seconds of a plan: the geometric mean of a replayed CUDA graph's and of an eager call's.

    A graph takes the device's time; eagerly the host starts calls while the device is at earlier
    ones, and the slower of the two decides. On a CPU both are the same.

    Args:
        work: library calls.
        figures: of the device.
        kernels: seconds of what the device does beside them.
        started: as many library calls as take the host as long as starting those kernels.
    """
    device = kernels + sum(w.seconds(figures) for w in work)
    host = figures.host_seconds * (started + sum(w.count for w in work))
    return math.sqrt(device * max(device, host))


def folds(n: int, matrix_bytes: int) -> bool:
    """Whether ``A × state [batch, k, n]`` is one tall product, at the price of two transpositions.

    A batched product leaves the vector lanes idle below 8 columns, and reads A anew for each
    batch: below 64 columns that costs more than the transpositions once A is out of cache.
    """
    return 1 < n < (64 if matrix_bytes > 8 * 2**20 else 8)


def merge_work(
    shapes: CoreShapes,
    split: tuple[int, ...],
    itemsize: int,
    gradients: Gradients | None,
    digits: bool = False,
) -> list[Work]:
    """The products and copies that merge the cores between the cuts, and take gradients apart.

    With ``digits`` products take operands that lie as chains of digits, and nothing is copied.
    """
    work = []
    for a, b in groups(split, len(shapes)):
        # A trained part is taken apart again: two products for each that merged it.
        times = 3 if gradients and any(gradients.cores[a:b]) else 1
        for k in range(a + 1, b):
            d, i, j, r = merged_shape(shapes[a:k])
            _, ik, jk, rk = shapes[k]
            # Written, and transposed in short runs.
            moved = 5 * d * i * j * ik * jk * rk * itemsize
            work.append(Work(d * i * j, ik * jk * rk, r, count=times))
            work += [] if digits else [Work(bytes=moved, count=times)]
    return work
